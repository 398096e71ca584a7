#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU VM or pod slice until it says that it is finished; see --help.
#
# Owns the life of the slice and of the command on it, and knows nothing of what the command does but its exit
# status: 0 finished, 75 saved and to be started again, 2 or 70 something for a human, anything else a failure.
# Laws: it never deletes a slice that is alive without being told to; it can be interrupted and started again at
# any moment, because all state is in the cloud; what cannot be read is never taken for "it is not there".
#
# The same file is the worker's half: it travels with the working tree and is called there with --on_worker.
# Some functions are called by a name that is put together, or by a trap.
# shellcheck disable=SC2329
set -euo pipefail

readonly PROGRAM="launch_tpu"
readonly EXIT_USAGE=2 EXIT_SICK=70 EXIT_PREEMPTED=75
# What says on a VM that it is about to be taken away, asked by curl: the program itself uses no network.
readonly METADATA="http://metadata.google.internal/computeMetadata/v1/instance" NOTICES=(preempted maintenance-event)
# A start that lasted this long was healthy: failures are counted anew after it.
readonly HEALTHY_SECONDS=1800 LONGEST_BACKOFF=600 MOST_LOG_BYTES=1048576 MOST_TRIES=5

usage() {
  cat <<'HELP'
launch_tpu.sh: runs one command on every worker of a Cloud TPU slice until it is finished.

  ./launch_tpu.sh --name=NAME --type=TYPE [options] -- COMMAND...
  ./launch_tpu.sh --name=NAME --type=TYPE (--stop | --delete)

For example:
  ./launch_tpu.sh --name=first --type=v6e-1 --fetch=runs -- \
    python -m lm.train --config=configs/quickstart.py --workdir=runs/first

It creates the slice or takes the one of that name, copies the working tree (uncommitted changes too, ignored files
not) to ~/lm of every worker, installs it, starts COMMAND there detached, and shows worker 0's log. COMMAND runs in
~/lm with the installed Python first on the PATH. Exit status 0 of COMMAND on all workers is the end; 75 (saved, to
be started again), a reboot or a preemption start it again; 2 and 70 (the run is sick) stop at once; any other is
tried again a few times.
Interrupt this script as you like: COMMAND goes on, and the same command line takes up watching it.

The slice:
  --name=NAME              of the slice: small letters, digits and hyphens
  --type=TYPE              accelerator type: v6e-8, v5p-32, v5e-16 (the same as v5litepod-16), v4-8, v3-8, v2-8
  --zone=ZONE              default: a zone that has the generation (see docs/tpu.md)
  --project=PROJECT        default: that of `gcloud config`
  --runtime_version=NAME   software of the VM; default: the one for the generation
  --spot                   cheaper, and taken away without much notice
  --queued                 asks through a queued resource and waits for it, instead of failing when there is none free
  --valid_for=DURATION     with --queued: give up waiting after this long, for example 6h
  --create_flag=FLAG       passed on to gcloud when creating, for example --create_flag=--reserved; may be repeated
  --connect_flag=FLAG      passed on to gcloud ssh and scp, for example --connect_flag=--internal-ip; may be repeated

The run:
  --bucket=gs://NAME       mounted (gcsfuse) at ~/lm/bucket of every worker: use --workdir=bucket/RUN in COMMAND
  --fetch=FOLDER           when finished, copies COMMAND's --workdir into FOLDER on this machine
  --fetch_only             copies it now, and does nothing else
  --max_failures=N         failures in a row before giving up (default 3)
  --backoff_seconds=N      wait after the first failure, doubled after each next (default 30)
  --poll_seconds=N         between two looks at the run (default 20)
  --grace_seconds=N        between asking the command to stop and killing it (default 120)
  --no_recreate            exit with status 75 when the slice was preempted, instead of creating it again

Endings:
  --stop                   asks the command to save and stop; the slice stays
  --delete                 deletes the slice and its queued resource, with everything on its disks
  --delete_when_done       the same once the command is finished and its results are safe (--fetch or --bucket)
  --dry_run                prints every command that it would run, and runs none
  --help                   this text

A preempted slice leaves its name behind; that empty name is removed so that the slice can be created again. Nothing
else is ever deleted without --delete or --delete_when_done, so a slice goes on costing money until you delete it.

Exit status: 0 finished, 2 something to mend (also COMMAND's own 2), 70 COMMAND's own, 75 stopped or preempted,
1 given up.
HELP
}

say() { printf '%s: %s\n' "$PROGRAM$([[ ${dry_run:-no} == no ]] || echo " (dry run)")" "$*" >&2; }

# Ends with the status $1 and one sentence.
end() {
  local status=$1
  shift
  say "$*"
  exit "$status"
}

pause() { if [[ $dry_run == no && $1 != 0 ]]; then sleep "$1"; fi; }

# --------------------------------------------------------------------------------------------------------------------
# The worker's half. Everything that it keeps is in ~/lm-run: pid, status, command, log, list of files.

worker_boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

# Prints "STATE CODE": absent, running, exited with its code, rebooted, or lost (gone and left no exit status).
worker_state() {
  local pid boot
  if [[ ! -s ~/lm-run/pid ]]; then
    echo "absent -"
    return
  fi
  read -r pid boot <~/lm-run/pid
  if [[ -s ~/lm-run/status ]]; then
    echo "exited $(cat ~/lm-run/status)"
  elif [[ $boot != "$(worker_boot)" ]]; then
    echo "rebooted -"
  elif kill -0 "$pid" 2>/dev/null; then
    echo "running -"
  else
    echo "lost -"
  fi
}

worker_unpack() {
  tar -tzf ~/lm.tar.gz | LC_ALL=C sort >~/lm-run/files.new
  if [[ -e ~/lm-run/files ]]; then
    # Only what an earlier copy brought: runs, caches and the bucket lie in the same folder.
    LC_ALL=C comm -23 ~/lm-run/files ~/lm-run/files.new | while IFS= read -r file; do rm -f -- ~/lm/"$file"; done
  fi
  tar -xzf ~/lm.tar.gz -C ~/lm
  mv ~/lm-run/files.new ~/lm-run/files
}

# Prints the newest Python on this machine that lm supports and that can make environments.
worker_python() {
  local python
  for python in python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$python"
      return
    fi
  done
  return 1
}

worker_install() {
  local python constraints stamp
  cd ~/lm
  stamp=$(cat setup.py constraints-*.txt | cksum)
  if [[ -e ~/lm-venv/installed && $(cat ~/lm-venv/installed) == "$stamp" ]]; then return; fi
  if [[ ! -x ~/lm-venv/bin/python ]]; then
    if python=$(worker_python); then
      "$python" -m venv ~/lm-venv
    else
      # Ubuntu 22.04, which the TPU images carry, has Python 3.10.
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 ~/lm-venv
    fi
  fi
  constraints="constraints-py312.txt"
  if ~/lm-venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    constraints="constraints-py311.txt"
  fi
  ~/lm-venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e '.[tpu]'
  echo "$stamp" >~/lm-venv/installed
}

worker_mount() {
  local bucket=$1 release
  mkdir -p ~/lm/bucket
  if mountpoint -q ~/lm/bucket; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    release="gcsfuse-$(lsb_release -cs)"
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt $release main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  # A checkpoint is committed by renaming its folder, which gcsfuse refuses on a flat bucket by default.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" ~/lm/bucket
}

# Asks the metadata server of this VM for what it says of $1; $2 says whether to wait for a change.
metadata() {
  curl -fs --noproxy '*' --connect-timeout 2 --max-time 30 -H 'Metadata-Flavor: Google' "$METADATA/$1${2:-}" 2>/dev/null
}

# Whether the cloud says by the key $1 that it takes this VM away soon.
worker_leaves() {
  local told
  told=$(metadata "$@") || return 2
  [[ $told == TRUE || $told == TERMINATE_ON_HOST_MAINTENANCE ]] || return 1
  say "the cloud takes this machine away ($1 is $told)"
}

# Waits for a notice by the key $1, then asks the session $2, the command in it, to save and stop.
worker_watch() {
  local found
  while true; do
    found=0
    # The time limit makes up for a change that falls between two requests.
    worker_leaves "$1" '?wait_for_change=true&timeout_sec=5' || found=$?
    case $found in
      0) break ;;
      1) sleep 0.2 ;;
      *) sleep 5 ;;
    esac
  done
  touch ~/lm-run/noticed ~/lm-run/asked
  kill -TERM -- "-$2"
}

# Runs the command to its end in the session that worker_start opened, and leaves its exit status behind.
worker_supervise() {
  local status=0 key watchers=()
  # The signal is for the command; this shell has to outlive it.
  trap : TERM INT HUP
  cd ~/lm
  export PATH="$HOME/lm-venv/bin:$PATH"
  if [[ -e ~/lm-run/noticed ]]; then
    for key in "${NOTICES[@]}"; do
      # Started on a VM that is about to go, it could only be stopped again.
      if worker_leaves "$key"; then status=$EXIT_PREEMPTED; fi
    done
  fi
  if [[ $status == 0 ]]; then
    rm -f ~/lm-run/noticed
    for key in "${NOTICES[@]}"; do
      worker_watch "$key" $$ &
      watchers+=("$!")
    done
    "$@" || status=$?
    kill "${watchers[@]}" 2>/dev/null || true
    # It ended by the signal before it listened to it, and so before it had anything to save.
    if [[ $status == 143 && -e ~/lm-run/asked ]]; then status=$EXIT_PREEMPTED; fi
  fi
  echo "$status" >~/lm-run/status.new
  mv ~/lm-run/status.new ~/lm-run/status
}

# Starts the command detached; does nothing if it already runs, so that it can be asked twice.
worker_start() {
  local words
  printf -v words '%q ' "$@"
  if [[ $(worker_state) == running* ]]; then
    [[ $(cat ~/lm-run/command) == "$words" ]]
    return
  fi
  rm -f ~/lm-run/status ~/lm-run/stopped ~/lm-run/asked
  echo "$words" >~/lm-run/command
  # The log is that of this start; what earlier ones wrote is kept beside it.
  if [[ -e ~/lm-run/log ]]; then cat ~/lm-run/log >>~/lm-run/log.earlier; fi
  : >~/lm-run/log
  setsid nohup bash ~/lm/launch_tpu.sh --on_worker supervise "$@" >>~/lm-run/log 2>&1 </dev/null &
  echo "$! $(worker_boot)" >~/lm-run/pid
}

# Asks the command and its children to stop, and kills them after $1 seconds.
worker_stop() {
  local pid tenths=$((10 * $1))
  if [[ $(worker_state) != running* ]]; then return; fi
  read -r pid _ <~/lm-run/pid
  touch ~/lm-run/asked
  kill -TERM -- "-$pid" 2>/dev/null || true
  while [[ $(worker_state) == running* ]]; do
    if ((tenths-- <= 0)); then
      kill -KILL -- "-$pid" 2>/dev/null || true
      echo 137 >~/lm-run/status
      return
    fi
    sleep 0.1
  done
}

worker_status() {
  local words which=other marked=-
  printf -v words '%q ' "$@"
  if [[ -e ~/lm-run/command && $(cat ~/lm-run/command) == "$words" ]]; then which=same; fi
  if [[ -e ~/lm-run/stopped ]]; then marked=stopped; fi
  echo "lm-worker $(worker_state) $which $marked"
}

worker() {
  local action=$1
  shift
  mkdir -p ~/lm-run ~/lm
  case $action in
    log) tail -c "+$(($1 + 1))" ~/lm-run/log 2>/dev/null | head -c "$MOST_LOG_BYTES" || true ;;
    status) worker_status "$@" ;;
    halt)
      touch ~/lm-run/stopped
      worker_stop "$@"
      echo "lm-worker done"
      ;;
    prepare)
      worker_unpack
      worker_install
      if [[ -n ${1:-} ]]; then worker_mount "$1"; fi
      echo "lm-worker done"
      ;;
    start | stop)
      "worker_$action" "$@"
      echo "lm-worker done"
      ;;
    supervise) worker_supervise "$@" ;;
  esac
}

# --------------------------------------------------------------------------------------------------------------------
# Talking to the cloud.

# Prints a command as it could be typed.
show() {
  local word text=""
  for word in "$@"; do
    if [[ ! $word =~ ^[-a-zA-Z0-9_./:=,@+%]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    text+="$word "
  done
  printf '%s\n' "${text% }" >&3
}

# Runs gcloud, or prints what would be run.
cloud() {
  if [[ $dry_run == yes ]]; then
    show gcloud "$@"
  else
    command gcloud "$@" </dev/null
  fi
}

# Runs `gcloud compute tpus ...`; its standard error lies in $scratch/error afterwards, its output in $answer.
ask() {
  if answer=$(cloud compute tpus "$@" "${location[@]}" 2>"$scratch/error"); then return 0; fi
  return 1
}

# Whether gcloud's last error speaks of one of these things.
complains() { grep -qiE "$1" "$scratch/error"; }

complaint() { grep -v '^[[:space:]]*$' "$scratch/error" | tail -n 1 | sed 's/^ERROR: *//'; }

# Sets answer to what describes $2 of the kind $1, or to MISSING; ends if that cannot be known.
describe() {
  local kind=$1 format=$2 tries=0
  until ask "$kind" describe "$name" "--format=$format"; do
    if complains 'NOT_FOUND|not found|does not exist'; then
      answer=MISSING
      return
    fi
    if complains 'PERMISSION_DENIED|UNAUTHENTICATED|not enabled|gcloud auth login|INVALID_ARGUMENT'; then
      end 1 "gcloud refuses to describe $name: $(complaint)"
    fi
    if ((++tries >= MOST_TRIES)); then end 1 "cannot find out about $name: $(complaint)"; fi
    pause "$poll_seconds"
  done
}

# Sets state (READY, PREEMPTED, MISSING, ...) and workers.
describe_slice() {
  local addresses
  describe tpu-vm 'value(state,networkEndpoints[].ipAddress)'
  if [[ $dry_run == yes ]]; then answer=$pretended; fi
  read -r state addresses <<<"$answer" || true
  # gcloud writes the list with commas or semicolons; one address is one worker.
  workers=$(grep -oE '[0-9]+(\.[0-9]+){3}' <<<"$addresses" | wc -l | tr -d ' ' || true)
  if [[ $workers == 0 ]]; then workers=1; fi
}

# Sets queue_state (ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, MISSING, ...).
describe_queue() {
  describe queued-resources 'value(state.state)'
  queue_state=$answer
  if [[ $dry_run == yes ]]; then
    queue_state=MISSING
    if [[ $pretended == READY* ]]; then queue_state=ACTIVE; fi
  fi
}

# Asks for the slice once; returns 1 where trying again later may help.
create_slice() {
  local wanted=("${create_flags[@]}")
  if [[ $spot == yes ]]; then wanted+=(--spot); fi
  say "asking for $type in $zone ($([[ $spot == yes ]] && echo spot || echo on demand)) as $name"
  if [[ $queued == yes ]]; then
    if [[ -n $valid_for ]]; then wanted+=("--valid-until-duration=$valid_for"); fi
    ask queued-resources create "$name" "--node-id=$name" "--runtime-version=$runtime_version" "${wanted[@]}" && return
  else
    ask tpu-vm create "$name" "--version=$runtime_version" "${wanted[@]}" && return
  fi
  if complains 'ALREADY_EXISTS|already exists'; then return 0; fi
  if complains 'quota'; then
    end 1 "the quota of the project does not allow $type in $zone: $(complaint)" \
      "(ask for more, or try another --zone, --type or --spot)"
  fi
  if complains 'capacity|RESOURCE_EXHAUSTED|stockout|UNAVAILABLE|INTERNAL|DEADLINE|Insufficient'; then return 1; fi
  end 1 "gcloud cannot create $name: $(complaint)"
}

# Removes the name that a preempted slice left behind.
remove_remains() {
  if [[ $recreate == no ]]; then end "$EXIT_PREEMPTED" "$name was preempted (--no_recreate)"; fi
  say "$name was preempted; removing what is left of it to create it again"
  if [[ $bucket == "" ]]; then
    say "its disks are gone: without --bucket a run whose folder was on them starts from the beginning"
  fi
  delete_slice
}

# Deletes the slice, and its queued resource if it has one.
delete_slice() {
  describe_queue
  if [[ $queue_state != MISSING || $dry_run == yes ]]; then
    if ! ask queued-resources delete "$name" --force --quiet && ! complains 'NOT_FOUND|not found'; then
      end 1 "cannot delete the queued resource $name: $(complaint)"
    fi
  fi
  describe_slice
  if [[ $state != MISSING || $dry_run == yes ]]; then
    if ! ask tpu-vm delete "$name" --quiet && ! complains 'NOT_FOUND|not found'; then
      end 1 "cannot delete $name: $(complaint)"
    fi
  fi
  exists=no
}

# Returns when the slice is READY, whatever it takes.
ensure_slice() {
  local tries=0 told="" now
  while true; do
    now=""
    if [[ $queued == yes ]]; then
      describe_queue
      now=$queue_state
      case $queue_state in
        ACTIVE | MISSING) ;;
        FAILED) end 1 "the queued resource $name failed (see gcloud compute tpus queued-resources describe); --delete it" ;;
        SUSPENDED) remove_remains && continue ;;
        *)
          if [[ $told != "$now" ]]; then say "$name: $now"; fi
          told=$now
          pause "$poll_seconds"
          continue
          ;;
      esac
    fi
    describe_slice
    case $state in
      READY)
        exists=yes
        return
        ;;
      MISSING)
        if [[ $now == ACTIVE ]]; then
          remove_remains
          continue
        fi
        if create_slice; then
          exists=yes
          pretended="READY 10.0.0.2"
        elif ((++tries >= create_tries)); then
          end 1 "no $type to be had in $zone after $tries tries: $(complaint) (--queued waits in line)"
        else
          say "none free: $(complaint); trying again"
          pause "$((backoff_seconds * tries))"
        fi
        ;;
      PREEMPTED | TERMINATED) remove_remains ;;
      STOPPED) ask tpu-vm start "$name" || end 1 "cannot start $name, which is stopped: $(complaint)" ;;
      *)
        if [[ $told != "$state" ]]; then say "$name: $state"; fi
        told=$state
        pause "$poll_seconds"
        ;;
    esac
  done
}

# --------------------------------------------------------------------------------------------------------------------
# Talking to the workers.

# Runs the worker's half on $1 (all, or a number) and keeps what it prints in $scratch/said.
on_workers() {
  local which=$1 words
  shift
  printf -v words ' %q' "$@"
  words="bash lm/launch_tpu.sh --on_worker$words"
  # This half comes with the first copy of the tree, out of which it is taken before all else.
  if [[ $1 == prepare ]]; then words="mkdir -p lm && tar -xzf lm.tar.gz -C lm launch_tpu.sh && $words"; fi
  if [[ $1 == status ]]; then words="if [ -e lm/launch_tpu.sh ]; then $words; else echo lm-worker absent; fi"; fi
  cloud compute tpus tpu-vm ssh "$name" "${location[@]}" "--worker=$which" "${connect_flags[@]}" \
    "--command=$words" >"$scratch/said" 2>"$scratch/error"
}

# Whether all workers do it, in a few tries.
all_do() {
  local tries=0
  while true; do
    on_workers all "$@" || true
    if [[ $dry_run == yes || $(grep -c 'lm-worker done' "$scratch/said") == "$workers" ]]; then return 0; fi
    if ((++tries >= MOST_TRIES)); then
      say "$(grep -c 'lm-worker done' "$scratch/said") of $workers workers did '$1': $(complaint)"
      return 1
    fi
    pause "$poll_seconds"
  done
}

send_tree() {
  local tries=0 archive=$scratch/lm.tar.gz
  if [[ $dry_run == yes ]]; then
    echo "git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf lm.tar.gz" >&3
    archive=lm.tar.gz
  else
    # Deleted files are still in the index; folders that hold runs and caches stay here even if not ignored.
    (cd "$root" &&
      git ls-files -z --cached --others --exclude-standard -- . ':!runs' ':!.jax_cache' ':!.venv' ':!bucket' |
      while IFS= read -r -d '' file; do
        if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
      done | tar --null -T - -czf "$archive") || end 1 "cannot pack the working tree $root"
  fi
  until cloud compute tpus tpu-vm scp "$archive" "$name:lm.tar.gz" "${location[@]}" --worker=all \
    "${connect_flags[@]}" >/dev/null 2>"$scratch/error"; do
    if ((++tries >= MOST_TRIES)); then
      say "cannot copy the working tree to $name: $(complaint)"
      return 1
    fi
    pause "$poll_seconds"
  done
}

# Counts in running, finished, saved, bad, sick, failed, rebooted, absent, other, stopped; returns 1 if a worker is silent.
poll() {
  local word what code which mark
  running=0 finished=0 saved=0 bad=0 sick=0 failed=0 rebooted=0 absent=0 other=0 stopped=0
  on_workers all status "${command_line[@]}" || true
  if [[ $dry_run == yes ]]; then
    if [[ $started == yes ]]; then finished=$workers; else absent=$workers; fi
    return 0
  fi
  while read -r word what code which mark; do
    if [[ $mark == stopped ]]; then stopped=$((stopped + 1)); fi
    if [[ $what == running && $which == other ]]; then other=$((other + 1)); fi
    case $what:${code:--} in
      running:*) running=$((running + 1)) ;;
      exited:0) finished=$((finished + 1)) ;;
      exited:"$EXIT_PREEMPTED") saved=$((saved + 1)) ;;
      exited:"$EXIT_USAGE") bad=$((bad + 1)) ;;
      exited:"$EXIT_SICK") sick=$((sick + 1)) ;;
      rebooted:*) rebooted=$((rebooted + 1)) ;;
      absent:*) absent=$((absent + 1)) ;;
      *)
        failed=$((failed + 1))
        last_code=${code/#-/none}
        ;;
    esac
  done < <(grep -o 'lm-worker .*' "$scratch/said" || true)
  ((running + finished + saved + bad + sick + failed + rebooted + absent == workers))
}

# Prints what worker 0's log has more than the last time; a lost connection costs nothing but time.
show_log() {
  local size
  while true; do
    on_workers 0 log "$log_offset" || true
    size=$(wc -c <"$scratch/said")
    cat "$scratch/said"
    log_offset=$((log_offset + size))
    if ((size < MOST_LOG_BYTES)); then return; fi
  done
}

# Starts the command on all workers, or finds it running there; returns 1 if that cannot be done.
attach_or_start() {
  local tries=0
  log_offset=0 started=no
  # Also a slice that is READY may take a while to answer; and the code of a living run must not be replaced.
  until poll; do
    if ((++tries >= MOST_TRIES)); then
      say "a worker of $name does not answer: $(complaint)"
      return 1
    fi
    pause "$poll_seconds"
  done
  if ((other > 0)); then
    end 1 "$name is busy with another command; wait for it, or --stop it, or use another --name"
  fi
  if ((running == workers)); then
    say "the command already runs on $name; showing its log"
    started=yes
    return 0
  fi
  if ((running > 0)); then all_do stop "$grace_seconds" || return 1; fi
  say "sending the working tree to $workers worker(s) of $name and installing it"
  send_tree && all_do prepare "${bucket#gs://}" && all_do start "${command_line[@]}" || return 1
  started=yes
}

# Watches until the command ended everywhere or the slice is gone; the verdict is in outcome.
watch() {
  local missed=0
  while true; do
    pause "$poll_seconds"
    show_log
    if ! poll; then
      describe_slice
      if [[ $state != READY ]]; then
        outcome=gone
        return
      fi
      if ((++missed >= MOST_TRIES)); then
        say "a worker of $name does not answer: $(complaint)"
        outcome=failed
        return
      fi
      continue
    fi
    missed=0
    if ((running == workers || (running > 0 && running + finished == workers))); then continue; fi
    if ((running > 0)); then
      # One worker ended badly: the others wait for it in a collective and would wait for ever.
      if all_do stop "$grace_seconds"; then poll || true; fi
    fi
    show_log
    if ((finished == workers)); then
      outcome=finished
    elif ((bad > 0)); then
      outcome=bad
    elif ((sick > 0)); then
      outcome=sick
    elif ((stopped > 0)); then
      outcome=stopped
    elif ((rebooted > 0 || absent > 0)); then
      outcome=rebooted
    elif ((failed > 0)); then
      outcome=failed
    else
      outcome=saved
    fi
    return
  done
}

# Copies the command's --workdir to this machine.
fetch() {
  local tries=0
  if [[ $dry_run == no ]]; then mkdir -p "$fetch_to"; fi
  say "copying $workdir to $fetch_to"
  while true; do
    if [[ -n $bucket && $workdir == bucket/* ]]; then
      cloud storage rsync --recursive "${bucket%/}/${workdir#bucket/}" "$fetch_to/$(basename "$workdir")" && return
    else
      local source=$workdir
      if [[ $workdir != /* && $workdir != "~"* ]]; then source="lm/$workdir"; fi
      cloud compute tpus tpu-vm scp --recurse "$name:$source" "$fetch_to" "${location[@]}" --worker=0 \
        "${connect_flags[@]}" && return
    fi
    if ((++tries >= MOST_TRIES)); then end 1 "could not copy the results; nothing was deleted"; fi
    pause "$poll_seconds"
  done
}

# --------------------------------------------------------------------------------------------------------------------
# From beginning to end.

launch() {
  local failures=0 since
  while true; do
    ensure_slice
    since=$SECONDS outcome=failed last_code=none
    if attach_or_start; then
      watch
    else
      describe_slice
      if [[ $state != READY ]]; then outcome=gone; fi
    fi
    case $outcome in
      finished) break ;;
      bad) end "$EXIT_USAGE" "the command says that something must be mended (exit status 2); see its last lines above" ;;
      sick) end "$EXIT_SICK" "the run is sick (exit status 70) and would be again; its report is above" ;;
      stopped) end "$EXIT_PREEMPTED" "the command was stopped; the same command line goes on with it" ;;
      saved) say "the command saved and stopped (exit status 75); starting it again" ;;
      rebooted) say "a worker restarted; starting the command again" ;;
      gone) say "$name is $state" ;;
      failed)
        if ((SECONDS - since > HEALTHY_SECONDS)); then failures=0; fi
        if ((++failures >= max_failures)); then
          end 1 "given up after $failures failure(s), the last with exit status $last_code"
        fi
        local wait_seconds=$((backoff_seconds << (failures - 1)))
        if ((wait_seconds > LONGEST_BACKOFF)); then wait_seconds=$LONGEST_BACKOFF; fi
        say "failure $failures of $max_failures (exit status $last_code); trying again in $wait_seconds s"
        pause "$wait_seconds"
        ;;
    esac
    # A command that saves and stops at once, for ever, must not spin.
    pause "$poll_seconds"
  done
  say "finished"
  if [[ -n $fetch_to ]]; then fetch; fi
  if [[ $delete_when_done == yes ]]; then
    delete_slice
    say "deleted $name"
  fi
}

# Says at the end that the slice is still there, which is easily forgotten and dearly paid.
leave() {
  local status=$?
  rm -rf "$scratch"
  if [[ ${exists:-no} == yes && $dry_run == no ]]; then
    say "$name still exists and costs money; delete it with: ./launch_tpu.sh --name=$name --type=$type --zone=$zone --delete"
  fi
  exit "$status"
}

interrupted() {
  trap - INT
  say "interrupted; what runs on $name goes on, and the same command line takes up watching it"
  exit 130
}

bad_usage() { end "$EXIT_USAGE" "$* (see --help)"; }

read_flags() {
  while (($# > 0)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --name=*) name=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --runtime_version=*) runtime_version=${1#*=} ;;
      --valid_for=*) valid_for=${1#*=} ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --connect_flag=*) connect_flags+=("${1#*=}") ;;
      --bucket=*) bucket=${1#*=} && bucket=${bucket%/} ;;
      --fetch=*) fetch_to=${1#*=} ;;
      --max_failures=*) max_failures=${1#*=} ;;
      --backoff_seconds=*) backoff_seconds=${1#*=} ;;
      --poll_seconds=*) poll_seconds=${1#*=} ;;
      --grace_seconds=*) grace_seconds=${1#*=} ;;
      --spot) spot=yes ;;
      --queued) queued=yes ;;
      --no_recreate) recreate=no ;;
      --delete_when_done) delete_when_done=yes ;;
      --dry_run) dry_run=yes ;;
      --stop | --delete | --fetch_only)
        if [[ $action != launch ]]; then bad_usage "give one of --stop, --delete and --fetch_only"; fi
        action=${1#--}
        ;;
      --)
        shift
        command_line=("$@")
        return
        ;;
      --name | --type | --zone | --project | --runtime_version | --valid_for | --create_flag | --connect_flag | \
        --bucket | --fetch | --max_failures | --backoff_seconds | --poll_seconds | --grace_seconds)
        bad_usage "$1 needs its value after an equals sign: $1=VALUE"
        ;;
      -*) bad_usage "there is no option $1" ;;
      *) bad_usage "$1 is no option; the command to run comes after --" ;;
    esac
    shift
  done
}

# Fills in zone and runtime version of the generation.
choose_defaults() {
  local its_zone="" its_runtime=""
  if [[ $type == v5e-* ]]; then type=v5litepod-${type#v5e-}; fi
  case $type in
    v6e-*) its_zone=us-east5-b its_runtime=v2-alpha-tpuv6e ;;
    v5p-*) its_zone=us-east5-a its_runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) its_zone=us-west4-a its_runtime=v2-alpha-tpuv5-lite ;;
    v4-*) its_zone=us-central2-b its_runtime=tpu-ubuntu2204-base ;;
    v3-8) its_zone=us-central1-a its_runtime=tpu-ubuntu2204-base ;;
    v3-*) its_zone=europe-west4-a its_runtime=tpu-ubuntu2204-base ;;
    v2-8) its_zone=us-central1-b its_runtime=tpu-ubuntu2204-base ;;
    v2-*) its_zone=us-central1-a its_runtime=tpu-ubuntu2204-base ;;
  esac
  zone=${zone:-$its_zone}
  runtime_version=${runtime_version:-$its_runtime}
  if [[ ! $type =~ ^[a-z0-9]+-[1-9][0-9]*$ || -z $zone || -z $runtime_version ]]; then
    bad_usage "--type=$type is no TPU type known here, such as v6e-8; for another give --zone and --runtime_version too"
  fi
}

check_usage() {
  local flag number previous="" word
  if [[ -z $name ]]; then bad_usage "give --name=NAME, the name of the slice"; fi
  if [[ ! $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]]; then
    bad_usage "--name=$name must begin with a small letter and have only small letters, digits and hyphens"
  fi
  if [[ -z $type ]]; then bad_usage "give --type=TYPE, for example --type=v6e-8"; fi
  choose_defaults
  for flag in max_failures backoff_seconds poll_seconds grace_seconds; do
    number=${!flag}
    if [[ ! $number =~ ^(0|[1-9][0-9]{0,6})$ ]]; then bad_usage "--$flag=$number is not a whole number"; fi
  done
  if [[ $max_failures == 0 ]]; then bad_usage "--max_failures must be at least 1"; fi
  if [[ -n $valid_for && $queued == no ]]; then bad_usage "--valid_for needs --queued"; fi
  if [[ -n $bucket && ! $bucket =~ ^gs://[a-z0-9][-_.a-z0-9]+$ ]]; then
    bad_usage "--bucket=$bucket must be gs://NAME, a bucket without a folder"
  fi
  for word in ${command_line[@]+"${command_line[@]}"}; do
    case $previous:$word in
      *:--workdir=*) workdir=${word#*=} ;;
      --workdir:*) workdir=$word ;;
    esac
    previous=$word
  done
  if [[ $workdir == gs://* ]]; then
    bad_usage "a run's folder is a folder: use --bucket=gs://NAME and --workdir=bucket/RUN, not --workdir=$workdir"
  fi
  if [[ $workdir == bucket/* && -z $bucket ]]; then bad_usage "--workdir=$workdir needs --bucket=gs://NAME"; fi
  if [[ $action == stop || $action == delete ]]; then
    if [[ -n ${command_line[*]-} ]]; then bad_usage "--$action takes no command"; fi
    return
  fi
  if [[ -z ${command_line[*]-} ]]; then bad_usage "give the command to run after --"; fi
  if [[ $action == fetch_only && -z $fetch_to ]]; then bad_usage "--fetch_only needs --fetch=FOLDER"; fi
  if [[ -n $fetch_to && -z $workdir ]]; then
    bad_usage "--fetch needs a command with --workdir=FOLDER, which is what it copies"
  fi
  if [[ $delete_when_done == yes && -z $fetch_to && $workdir != bucket/* ]]; then
    bad_usage "--delete_when_done would destroy the results: add --fetch=FOLDER, or --bucket and --workdir=bucket/RUN"
  fi
}

main() {
  if [[ ${1:-} == --on_worker ]]; then
    shift
    worker "$@"
    return
  fi
  name="" type="" zone="" project="" runtime_version="" valid_for="" bucket="" fetch_to="" workdir=""
  max_failures=3 backoff_seconds=30 poll_seconds=20 grace_seconds=120 create_tries=10
  spot=no queued=no recreate=yes delete_when_done=no dry_run=no action=launch
  create_flags=() command_line=() exists=no started=no pretended=MISSING
  # The keys of a slice that was created again are new; a dead connection must end by itself.
  connect_flags=(--quiet --strict-host-key-checking=no --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=15)
  read_flags "$@"
  check_usage
  create_flags=("--accelerator-type=$type" ${create_flags[@]+"${create_flags[@]}"})
  location=("--zone=$zone")
  if [[ -n $project ]]; then location+=("--project=$project"); fi
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  exec 3>&1
  if [[ $dry_run == no ]] && ! command -v gcloud >/dev/null; then
    end "$EXIT_USAGE" "there is no gcloud on the PATH; install the Google Cloud CLI and run gcloud init"
  fi
  if ! git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    end "$EXIT_USAGE" "$root is not a git working tree, which is what is copied to the workers"
  fi
  scratch=$(mktemp -d)
  trap leave EXIT
  trap interrupted INT
  case $action in
    launch) launch ;;
    fetch_only) fetch ;;
    delete)
      delete_slice
      say "deleted $name"
      ;;
    stop)
      describe_slice
      if [[ $state != READY && $dry_run == no ]]; then end 1 "$name is $state; nothing runs on it"; fi
      all_do halt "$grace_seconds" || end 1 "could not stop all workers of $name"
      exists=yes
      say "stopped; the slice stays"
      ;;
  esac
}

main "$@"
exit
