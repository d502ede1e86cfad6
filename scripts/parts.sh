# Sourced by the check scripts: named parts with their minutes, and what needs the network.
# shellcheck shell=bash

CARGO_DENY_VERSION=0.20.2
TOOLS="$PWD/.cache/tools"
# Nothing below .cache/ is tracked.
export PYTHONPYCACHEPREFIX="$PWD/.cache/pycache"

PARTS=()

# part NAME COMMAND...: runs a command, ends the script if it fails, notes its time.
part() {
    local name=$1 start status
    shift
    printf '\n== %s\n' "$name"
    start=$(date +%s)
    NOTE=""
    # In a subshell of its own `set -e` stays in force, which it would not within `if` or `||`.
    set +e
    (set -e; "$@") </dev/null
    status=$?
    set -e
    if [ "$status" -eq "$SKIPPED" ]; then
        NOTE="SKIPPED"
    elif [ "$status" -ne 0 ]; then
        NOTE="FAILED"
    fi
    PARTS+=("$(printf '%6.1f min  %-24s %s' "$(minutes "$(($(date +%s) - start))")" "$name" "$NOTE")")
    if [ "$NOTE" = FAILED ]; then
        summary
        exit 1
    fi
}

# The exit status of a part that could not run for a reason outside the project.
SKIPPED=77

minutes() {
    awk -v seconds="$1" 'BEGIN { print seconds / 60 }'
}

summary() {
    printf '\n== minutes\n'
    printf '%s\n' "${PARTS[@]}"
    printf '%6.1f min  in all\n' "$(minutes "$SECONDS")"
}

# Compiled once, into .cache/, in a quarter of the time without optimisation: it runs for two seconds.
install_cargo_deny() {
    if [ "$("$TOOLS/bin/cargo-deny" --version 2>/dev/null)" != "cargo-deny $CARGO_DENY_VERSION" ]; then
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256 \
            cargo install cargo-deny --version "$CARGO_DENY_VERSION" --locked --root "$TOOLS" \
            --target-dir .cache/build
        rm -rf .cache/build
    fi
}

cargo_deny() {
    "$TOOLS/bin/cargo-deny" --locked "$@"
}

# The advisory database lies on a git host that not every machine reaches: that is said, never passed over.
advisories() {
    if ! timeout 120 "$TOOLS/bin/cargo-deny" fetch db; then
        echo "SKIPPED: the advisory database could not be fetched, so advisories were not checked"
        exit "$SKIPPED"
    fi
    cargo_deny check advisories
}
