#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The whole protocol of the studies on one GPU: every network, recipe, size and seed, then the summaries.
#
#     bash experiments/run_all.sh DATA [OUT]          # OUT: runs/protocol
#
# A step that is done is skipped and one that was broken off goes on where it was, so after a kill give the same command
# again. Each step's time is printed and kept in OUT/times.csv.
#
#     SEEDS="0 1 2"  SIZES="64 124"  RECIPES="strong paper"  EPOCHS=30        # fewer or more of them
#     TASKS="task1 task2"  GROUPS1="stems specialists ablations wide"         # tasks; networks of Task I
#     GROUPS2="main sizes ablations"  LONG=120                                # networks of Task II; the longer run's epochs
#     PYTHON=python3  DEVICE=auto
#     SMOKE=1                                         # generated images, one epoch: proves that the steps run
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=${1:?usage: bash experiments/run_all.sh DATA [OUT]}
out=${2:-runs/protocol}
read -r -a seeds <<< "${SEEDS:-0 1 2}"
read -r -a sizes <<< "${SIZES:-64 124}"
tasks=" ${TASKS:-task1 task2} "
python=${PYTHON:-python}
mkdir -p "$out"

# step NAME COMMAND...: run a command unless it has been done, and note its time.
step() {
  local name=$1 begin=$SECONDS
  shift
  if [[ -e "$out/.done/$name" ]]; then
    echo "=== $name: done before"
    return
  fi
  echo "=== $name"
  "$@"
  mkdir -p "$(dirname "$out/.done/$name")"
  touch "$out/.done/$name"
  echo "$name,$((SECONDS - begin))" >> "$out/times.csv"
  echo "=== $name: $((SECONDS - begin)) s (all: $SECONDS s)"
}

# study SCRIPT FOLDER OPTIONS...: start a run, or continue the one that is there.
study() {
  local script=$1 folder=$2
  shift 2
  if [[ -e "$folder/config.json" ]]; then
    "$python" "$here/$script.py" --output "$folder" --resume --device "${DEVICE:-auto}"
  else
    "$python" "$here/$script.py" --output "$folder" --device "${DEVICE:-auto}" "$@"
  fi
}

epochs=(${EPOCHS:+--epochs "$EPOCHS"})
if [[ -n "${SMOKE:-}" ]]; then
  sizes=(16)
  source=(--smoke)
  recipes=(smoke)
else
  source=(--data "$data")
  read -r -a recipes <<< "${RECIPES:-strong paper}"
fi
groups=" ${GROUPS1:-stems specialists ablations wide} "

# ------------------------------------------------------------------------------------------------------------- Task I
# The strong recipe at the first size comes first, and with it whatever takes a part away or adds channels: a broken-off
# run has the main results. Preparing the paper recipe's images takes a core 50 ms each, once.
if [[ "$tasks" == *" task1 "* ]]; then
  for recipe in "${recipes[@]}"; do
    for size in "${sizes[@]}"; do
      runs="$out/task1/$recipe-${size}px"
      options=("${source[@]}" --image-size "$size" "${epochs[@]}")
      [[ $recipe == smoke ]] || options+=(--preset "$recipe")
      for group in stems specialists ablations wide; do
        [[ "$groups" == *" $group "* ]] || continue
        [[ $group == stems || $group == specialists || ($recipe != paper && $size == "${sizes[0]}") ]] || continue
        for seed in "${seeds[@]}"; do
          step "task1/$recipe-$size-seed$seed-$group" \
            study task1 "$runs/seed$seed-$group" "${options[@]}" --seed "$seed" --models "$group"
        done
      done
      "$python" "$here/summarize.py" "$runs"
    done
  done
fi

# ------------------------------------------------------------------------------------------------------------ Task II
# As above; a longer run of the main networks comes last.
groups=" ${GROUPS2:-main sizes ablations} "
long=${LONG:-120}
if [[ "$tasks" == *" task2 "* ]]; then
  for recipe in "${recipes[@]}"; do
    for size in "${sizes[@]}"; do
      [[ -z "${SMOKE:-}" ]] || size=32
      runs="$out/task2/$recipe-${size}px"
      options=("${source[@]}" --image-size "$size" "${epochs[@]}")
      [[ $recipe == smoke ]] || options+=(--preset "$recipe")
      for group in main sizes ablations; do
        [[ "$groups" == *" $group "* ]] || continue
        [[ $group == main || ($recipe != paper && $size == "${sizes[0]}") || -n "${SMOKE:-}" ]] || continue
        for seed in "${seeds[@]}"; do
          step "task2/$recipe-$size-seed$seed-$group" \
            study task2 "$runs/seed$seed-$group" "${options[@]}" --seed "$seed" --models "$group"
        done
      done
    done
  done
  size=${sizes[0]}
  if [[ " ${recipes[*]} " == *" strong "* && $long != 0 ]]; then
    for seed in "${seeds[@]}"; do
      step "task2/strong-$size-seed$seed-long" \
        study task2 "$out/task2/strong-${size}px-long/seed$seed-main" "${source[@]}" --image-size "$size" \
        --preset strong --epochs "$long" --seed "$seed" --models main
    done
  fi
  for runs in "$out"/task2/*px*; do
    # The best network is also held against the ResNet-34 of the source report's recipe.
    against=${runs/strong/paper}
    against=${against%-long}
    [[ $runs != "$against" && -d $against ]] && other=(--against "$against") || other=()
    "$python" "$here/summarize.py" "$runs" "${other[@]}"
  done
fi

echo
echo "Seconds by step: $out/times.csv"
