# Sourced by the scripts beside it: flags, settings, and the ways to gcloud.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
me=$(basename "$0")
scratch=$(mktemp -d)
agent_pid=""
trap 'rm -rf "$scratch"; [ -z "$agent_pid" ] || kill "$agent_pid"' EXIT

say() { printf '%s: %s\n' "$me" "$*" >&2; }
fail() { say "$*"; exit 1; }
refuse() { say "$* (see $me --help)"; exit 2; }

# Words -> one line that any shell reads back as the same words.
quote() {
    local word line="" inner="'\\''"
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
            line+=" $word"
        else
            line+=" '${word//\'/$inner}'"
        fi
    done
    printf '%s' "${line# }"
}

# Runs a command; under --dry_run prints it instead.
act() {
    if [ "$dry_run" = true ]; then
        quote "$@"
        echo
    else
        "$@"
    fi
}

# ---- flags

env_file=$here/env
dry_run=false
passed=()  # what sibling scripts are given too

# Reads one of the flags that all scripts have; returns 1 for another word.
common_flag() {
    case $1 in
        --help) usage; exit 0 ;;
        --dry_run) dry_run=true; passed+=(--dry_run) ;;
        --env=*) env_file=${1#--env=}; passed+=("$1") ;;
        *) return 1 ;;
    esac
}

unknown() {
    case $1 in
        -*) refuse "unknown flag ${1%%=*}" ;;
        *) refuse "unknown argument $1" ;;
    esac
}

# NAME VALUE -> fails unless it is a whole number.
whole() { [[ $2 =~ ^[0-9]+$ ]] || refuse "$1: expected a whole number, got '$2'"; }

# ---- settings

SETTINGS="PROJECT ZONE TPU_NAME TPU_TYPE TPU_VERSION SPOT QUEUED VALID_UNTIL MAX_RUN DATA SECRETS EXTRAS NETWORK SUBNETWORK SERVICE_ACCOUNT SSH SSH_BATCH"
REQUIRED="PROJECT ZONE TPU_NAME TPU_TYPE TPU_VERSION"

# KEY -> the pattern of its values and an example, separated by a blank.
pattern_of() {
    case $1 in
        PROJECT) echo '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9] my-project' ;;
        ZONE) echo '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+ us-west4-a' ;;
        TPU_NAME) echo '[a-z]([a-z0-9-]{0,38}[a-z0-9])? jaxtune' ;;
        TPU_TYPE) echo '(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]* v5litepod-16' ;;
        TPU_VERSION) echo '[a-z0-9][a-z0-9.-]+ v2-alpha-tpuv5-lite' ;;
        SPOT | QUEUED) echo '(true|false) true' ;;
        VALID_UNTIL | MAX_RUN) echo '[1-9][0-9]*[smhd] 6h' ;;
        DATA) echo 'gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._/-]*)? gs://my-bucket/data' ;;
        SECRETS) echo '[A-Za-z0-9._/~+-]+ secrets' ;;
        EXTRAS) echo '[a-z]+(,[a-z]+)* tpu,wandb' ;;
        NETWORK | SUBNETWORK) echo '[A-Za-z0-9./_-]+ default' ;;
        SERVICE_ACCOUNT) echo '[^@[:space:]]+@[A-Za-z0-9.-]+ tuner@my-project.iam.gserviceaccount.com' ;;
        SSH) echo '(external|internal|iap) external' ;;
        SSH_BATCH) echo '[1-9][0-9]* 32' ;;
    esac
}

# shellcheck disable=SC2034 # other scripts read them
# Reads the env file into the variables of its keys; a wrong line ends the script with exit code 2.
load_settings() {
    local line key value number=0 rule
    for key in $SETTINGS; do printf -v "$key" '%s' ""; done
    SPOT=false QUEUED=false EXTRAS=tpu SSH=external
    [ -f "$env_file" ] || refuse "there is no $env_file: copy $here/env.example to it and fill it in"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || refuse "$env_file:$number: expected KEY=VALUE"
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]%"${BASH_REMATCH[2]##*[![:space:]]}"}
        rule=$(pattern_of "$key")
        [ -n "$rule" ] || refuse "$env_file:$number: unknown setting $key (known: $SETTINGS)"
        [[ $value =~ ^(${rule% *})$ ]] || refuse "$env_file:$number: $key: expected something like ${rule##* }, got '$value'"
        printf -v "$key" '%s' "$value"
    done <"$env_file"
    for key in $REQUIRED; do
        rule=$(pattern_of "$key")
        [ -n "${!key}" ] || refuse "$env_file: $key is missing, for example $key=${rule##* }"
    done
    [ -z "$MAX_RUN" ] || [ "$SPOT" = false ] || refuse "$env_file: MAX_RUN is flex-start, which excludes SPOT=true"
    check_version
    where=(--project="$PROJECT" --zone="$ZONE")
    if [ -n "$SECRETS" ]; then
        case $SECRETS in
            /*) ;;
            \~/*) SECRETS=$HOME/${SECRETS#\~/} ;;
            *) SECRETS=$(cd "$(dirname "$env_file")" && pwd)/$SECRETS ;;
        esac
        check_secrets
    fi
}

check_version() {
    local right
    case $TPU_TYPE in
        v5litepod-*) right=v2-alpha-tpuv5-lite ;;
        v5p-*) right=v2-alpha-tpuv5 ;;
        v6e-*) right=v2-alpha-tpuv6e ;;
        *) right=tpu-ubuntu2204-base ;;
    esac
    [ "$TPU_VERSION" = "$right" ] || say "warning: TPU_VERSION=$TPU_VERSION; Google names $right for $TPU_TYPE"
}

# A file that others can read, or that would be executed as something else, is refused. No value
# is ever printed.
check_secrets() {
    local line number=0 mode
    [ -f "$SECRETS" ] || refuse "$env_file: SECRETS: there is no $SECRETS"
    mode=$(stat -c %a "$SECRETS" 2>/dev/null || stat -f %Lp "$SECRETS")
    [[ $mode =~ ^[0-7]?[0-7]00$ ]] || refuse "$SECRETS can be read by others (mode $mode): chmod 600 $SECRETS"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[A-Z][A-Z0-9_]*=[A-Za-z0-9_.:/+=@-]+$ ]] || refuse "$SECRETS:$number: expected NAME=VALUE without quotes or blanks"
    done <"$SECRETS"
}

# ---- the slice

# Flags that `create` and `queue` share.
node_flags() {
    flags=()
    [ "$SPOT" = false ] || flags+=(--spot)
    [ -z "$NETWORK" ] || flags+=(--network="$NETWORK")
    [ -z "$SUBNETWORK" ] || flags+=(--subnetwork="$SUBNETWORK")
    [ -z "$SERVICE_ACCOUNT" ] || flags+=(--service-account="$SERVICE_ACCOUNT" --scopes=https://www.googleapis.com/auth/cloud-platform)
    [ "$SSH" = external ] || flags+=(--internal-ips)
}

# KIND (tpu-vm | queued-resources) FIELD -> the value, or MISSING. Fails if gcloud cannot tell.
describe() {
    local text status=0
    text=$(gcloud compute tpus "$1" describe "$TPU_NAME" "${where[@]}" --format="value($2)" </dev/null 2>"$scratch/describe") || status=$?
    if [ "$status" = 0 ]; then
        printf '%s\n' "$text"
    elif grep -Eqi 'not_found|was not found' "$scratch/describe"; then
        echo MISSING
    else
        cat "$scratch/describe" >&2
        return 1
    fi
}

node_state() { describe tpu-vm state; }
queue_state() { describe queued-resources state.state; }

# Deletes a queued resource with its slice, or the slice alone; what is not there is left out.
delete_slice() {
    local state=""
    [ "$dry_run" = true ] || state=$(queue_state)
    if [ "$state" != MISSING ]; then
        act gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
    fi
    [ "$dry_run" = true ] || state=$(node_state)
    if [ "$state" != MISSING ]; then
        act gcloud compute tpus tpu-vm delete "$TPU_NAME" "${where[@]}" --quiet
    fi
}

# FILE with gcloud's messages -> whether another attempt can help. A quota does not grow by waiting.
worth_retrying() {
    if grep -qi 'quota' "$1"; then
        say "the project's quota for $TPU_TYPE in $ZONE is used up or zero: ask for more at https://console.cloud.google.com/iam-admin/quotas (spot slices have one of their own)"
        return 1
    fi
    grep -Eqi 'no more capacity|stockout|RESOURCE_EXHAUSTED|RESOURCE_POOL_EXHAUSTED|insufficient (reserved )?capacity|enough resources|currently unavailable|UNAVAILABLE|DEADLINE_EXCEEDED|internal error' "$1"
}

# ATTEMPT FIRST -> waits FIRST seconds, doubled with each attempt, at most ten minutes.
back_off() {
    local seconds=$2 i
    for ((i = 1; i < $1 && seconds < 600; i++)); do seconds=$((seconds * 2)); done
    [ "$seconds" -le 600 ] || seconds=600
    say "next attempt in $seconds s"
    sleep "$seconds"
}

# ---- the workers

# gcloud has batches and the proxy in its alpha track only.
ssh_flags() {
    track=()
    via=(--quiet)
    [ "$SSH" != internal ] || via+=(--internal-ip)
    [ "$SSH" != iap ] || via+=(--tunnel-through-iap)
    [ -z "$SSH_BATCH" ] || via+=(--batch-size="$SSH_BATCH")
    if [ "$SSH" = iap ] || [ -n "$SSH_BATCH" ]; then track=(alpha); fi
}

# WORKER (a number or all) COMMAND: runs the command line in the workers' shells.
remote() {
    local worker=$1
    ssh_flags
    act gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$worker" "${via[@]}" --command="$2" </dev/null
}

# FILE PATH: copies the file to that path on all workers.
send() {
    ssh_flags
    act gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" "${where[@]}" --worker=all "${via[@]}" </dev/null
}

# gcloud refuses to speak to several workers with a key that the agent does not hold. It makes the
# key at the first contact with one worker.
hold_key() {
    local key=$HOME/.ssh/google_compute_engine status=0
    { [ "$dry_run" = false ] && [ -f "$key" ]; } || return 0
    ssh-add -l >/dev/null 2>&1 || status=$?
    if [ "$status" = 2 ]; then
        eval "$(ssh-agent -s)" >/dev/null
        agent_pid=$SSH_AGENT_PID
    fi
    ssh-add -q "$key" 2>/dev/null || say "warning: ssh-add $key failed; several workers may not be reached"
}

# The script that runs on the workers, and its arguments, as a command line for their shells.
worker() { quote jaxtune/tpu_scripts/worker "$@"; }

# DIRECTORY: copies the sources there as they are in the working tree, without what git ignores.
sources_to() {
    local root
    root=$(cd "$here/.." && pwd)
    (
        cd "$root" || exit
        git ls-files -z --cached --others --exclude-standard >"$scratch/listed" || fail "$root is not a git checkout"
        while IFS= read -r -d '' file; do
            case $file in tpu_scripts/env | tpu_scripts/secrets*) continue ;; esac
            [ ! -f "$file" ] || printf '%s\0' "$file"
        done <"$scratch/listed" >"$scratch/files"
        tar --null -T "$scratch/files" -cf - | tar -xf - -C "$1"
    )
}

# COMMAND ... -> the workdir of a `jaxtune train`, which must outlive the slice; nothing for others.
workdir_of() {
    local word found=""
    [ "$1" = jaxtune ] && [ "${2:-}" = train ] || return 0
    for word in "$@"; do
        case $word in
            --workdir=*) found=${word#--workdir=} ;;
            --workdir) refuse "write --workdir=DIR, in one word" ;;
            --dry_run) return 0 ;;
        esac
    done
    [ -n "$found" ] || refuse "jaxtune train needs --workdir=gs://BUCKET/…"
    [[ $found =~ ^gs://[a-z0-9] ]] || refuse "--workdir=$found is lost with the slice: give it --workdir=gs://BUCKET/…"
    printf '%s' "$found"
}
