# Steps that have a time limit each and are cut off alone: sourced by gpu.sh.
#   step SECONDS WHAT COMMAND ...    what a step leaves of its SECONDS, those behind it may use
#   start SECONDS WHAT COMMAND ...   the same beside others, which ...
#   finish                           ... waits for; they share the largest of their budgets
#   left_out WHAT WHY
#   summary                          every step's verdict and seconds; its status is 1 if one failed or was cut off
# With patience=3 all of them have three times as long.

verdicts=() waiting=() pids=() deadline=0 together=0 wrong=0 scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

limit_of() { # SECONDS behind the deadline so far; at least 1
  local left=$((deadline + ${patience:-1} * $1 - SECONDS))
  echo $((left > 0 ? left : 1))
}

judge() { # WHAT STATUS SECONDS LIMIT
  local verdict=fine
  if [ "$2" -eq 124 ] || { [ "$2" -eq 137 ] && (($3 >= $4)); }; then
    verdict="CUT OFF after $4 s" wrong=1
  elif [ "$2" -ne 0 ]; then
    verdict="FAILED, exit status $2" wrong=1
  fi
  verdicts+=("$(printf '%4s s  %-24s %s' "$3" "$verdict" "$1")")
  echo "-- $1: $verdict, $3 s"
}

step() {
  local limit began=$SECONDS status=0
  limit=$(limit_of "$1")
  deadline=$((deadline + ${patience:-1} * $1))
  printf '\n== %s (at most %s s)\n' "$2" "$limit"
  timeout --kill-after=3 "$limit" "${@:3}" < /dev/null || status=$?
  judge "$2" "$status" $((SECONDS - began)) "$limit"
}

start() {
  local limit number=${#waiting[@]}
  limit=$(limit_of "$1")
  ((together >= $1)) || together=$1
  (
    began=$SECONDS status=0
    timeout --kill-after=3 "$limit" "${@:3}" < /dev/null > "$scratch/$number" 2>&1 || status=$?
    echo "$status $((SECONDS - began)) $limit" > "$scratch/$number.done"
  ) &
  waiting+=("$2") pids+=("$!")
}

finish() {
  local i status seconds limit
  for i in "${!waiting[@]}"; do
    wait "${pids[i]}"
    read -r status seconds limit < "$scratch/$i.done"
    printf '\n== %s (at most %s s)\n' "${waiting[i]}" "$limit"
    cat "$scratch/$i"
    judge "${waiting[i]}" "$status" "$seconds" "$limit"
  done
  deadline=$((deadline + ${patience:-1} * together)) together=0 waiting=() pids=()
}

left_out() {
  verdicts+=("$(printf '%4s    %-24s %s' "" "left out: $2" "$1")")
  printf '\n== %s\n-- left out: %s\n' "$1" "$2"
}

summary() {
  printf '\n== summary\n'
  printf '%s\n' "${verdicts[@]}"
  printf '%4s s  of %s; %s\n' "$SECONDS" "$deadline" "$( ((wrong)) && echo "not all of it right" || echo "all of it right")"
  return "$wrong"
}
