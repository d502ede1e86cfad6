#!/usr/bin/env bash
# A job over an array of machines that share a file system; a task that is killed goes on when it is requeued.
#
#   sbatch --array=0-3 examples/slurm.sh MODEL prompts.jsonl completions
#   tidemill merge --output completions.jsonl completions-*.jsonl       # when all are done
#
#SBATCH --job-name=tidemill
#SBATCH --requeue
#SBATCH --exclusive
set -euo pipefail
MODEL=$1 INPUT=$2 OUTPUT=$3
# Packed models and offloaded layers belong on a local disk.
export TIDEMILL_CACHE_DIR="${TIDEMILL_CACHE_DIR:-${TMPDIR:-/tmp}/tidemill}"
exec "${TIDEMILL_BIN:-tidemill}" generate --model "$MODEL" --input "$INPUT" \
    --output "$OUTPUT-$SLURM_ARRAY_TASK_ID.jsonl" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
