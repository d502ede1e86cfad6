//! Streams, and marks in them.
//!
//! **Invariant:** an event belongs to one mark at a time, so a mark stays where it is until nobody has it any more. No
//! event is ever destroyed before the device goes.

use std::sync::{Arc, Mutex};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUevent_flags, CUstream};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

/// A stream of the card.
pub struct Queue {
    stream: Arc<CudaStream>,
    events: Arc<Events>,
}

/// Events that no mark has.
pub struct Events {
    context: Arc<CudaContext>,
    free: Mutex<Vec<CudaEvent>>,
}

/// A point in what a stream was given.
#[derive(Clone)]
pub struct Mark(Arc<Held>);

struct Held {
    /// None only while it is given back.
    event: Option<CudaEvent>,
    events: Arc<Events>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let (Some(event), Ok(mut free)) = (self.event.take(), self.events.free.lock()) {
            free.push(event);
        }
    }
}

impl Events {
    /// No events yet: as many are made as marks are had at the same time.
    pub fn new(context: &Arc<CudaContext>) -> Arc<Events> {
        Arc::new(Events { context: context.clone(), free: Mutex::default() })
    }

    fn take(self: &Arc<Self>) -> Result<Held, DriverError> {
        let free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
        let event = match free {
            Some(event) => event,
            // It takes the time, and threads that wait for it sleep.
            None => self.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?,
        };
        Ok(Held { event: Some(event), events: self.clone() })
    }
}

impl Queue {
    /// A stream of a context.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: &Arc<CudaContext>, events: &Arc<Events>) -> Result<Queue, DriverError> {
        Ok(Queue { stream: context.new_stream()?, events: events.clone() })
    }

    /// The stream.
    pub fn raw(&self) -> CUstream {
        self.stream.cu_stream()
    }

    /// A mark behind everything that was put into the stream so far.
    pub fn mark(&self) -> Result<Mark, DriverError> {
        let held = self.events.take()?;
        held.event().record(&self.stream)?;
        Ok(Mark(Arc::new(held)))
    }

    /// Makes what is put into the stream from now on come after a mark of any stream.
    pub fn follow(&self, mark: &Mark) -> Result<(), DriverError> {
        self.stream.wait(mark.0.event())
    }

    /// Waits, asleep, until everything that was put into the stream so far is over.
    pub fn wait(&self) -> Result<(), DriverError> {
        self.mark()?.wait()
    }
}

impl Held {
    fn event(&self) -> &CudaEvent {
        self.event.as_ref().expect("it is given back at the end")
    }
}

impl Mark {
    /// Whether it has been passed.
    pub fn passed(&self) -> Result<bool, DriverError> {
        self.0.events.context.bind_to_thread()?;
        self.0.event().try_is_complete()
    }

    /// Waits, asleep, until it has been passed.
    pub fn wait(&self) -> Result<(), DriverError> {
        // Who asks first need not be put to sleep where there is nothing to wait for.
        if self.passed()? { Ok(()) } else { self.0.event().synchronize() }
    }

    /// Seconds from one mark to another, both passed.
    pub fn secs_until(&self, later: &Mark) -> Result<f64, DriverError> {
        self.0.events.context.bind_to_thread()?;
        // SAFETY: both events live as long as their marks, and were made to take the time.
        let millis = unsafe { result::event::elapsed(self.0.event().cu_event(), later.0.event().cu_event()) }?;
        Ok(f64::from(millis) * 1e-3)
    }
}
