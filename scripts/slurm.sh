#!/bin/bash
# A training job on one or several nodes of a SLURM cluster. It survives preemption and the time limit.
#
#   sbatch scripts/slurm.sh train_configs/x.yaml                              one node, GPUs as below
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh train_configs/x.yaml  four nodes of eight
#   sbatch scripts/slurm.sh train_configs/x.yaml run.init_lr=1e-5             further words are --options
#
# Call it from the root of this repository; output_dir must lie on a file system that all nodes share.
# Environment: VENV       virtual environment to use                        (.venv)
#              RESTARTS   how often torchrun starts the ranks again         (2)
#              PORT       where ranks meet on the first node                (from the job's number)
#
# Adapt these lines, or give the same flags to sbatch:
#SBATCH --job-name=minigpt4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --output=slurm_%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
# 10 minutes before the time limit the shell below gets SIGTERM; clusters that preempt send it as well:
#SBATCH --signal=B:TERM@600
# One task per node: torchrun starts one rank per GPU in it.
set -euo pipefail

if (( $# == 0 )) || [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch scripts/slurm.sh FILE.yaml [KEY=VALUE ...]" >&2
    exit 2
fi
config=$1
shift
options=()
if (( $# > 0 )); then
    options=(--options "$@")
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_host=${hosts[0]}
port=${PORT:-$(( 20000 + SLURM_JOB_ID % 20000 ))}
gpus=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ${SLURM_CPUS_PER_TASK:-1} / gpus > 0 ? ${SLURM_CPUS_PER_TASK:-1} / gpus : 1 ))}

# How long torchrun lets the ranks save after a SIGTERM before it kills them (its own default, 30 s, is short for a
# large window and a slow disk). Below the 600 s of --signal above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# SIGTERM: handed on once to torchrun and by it to every rank. The ranks finish their window, save, and end.
signals=0
stop() {
    signals=$(( signals + 1 ))
    (( signals == 1 )) || return 0
    echo "SIGTERM: the ranks finish their window and save; then this job goes back into the queue"
    scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}
trap stop TERM

# --resume auto: the first start begins, every later one goes on from the last whole checkpoint of this job_name.
# exec keeps torchrun the direct child of srun, so that a signal reaches it.
srun --kill-on-bad-exit=1 bash -c 'exec "$@"' rank "${VENV:-.venv}/bin/torchrun" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$gpus" --max-restarts="${RESTARTS:-2}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first_host:$port" \
    train.py --cfg-path "$config" --resume auto ${options[@]+"${options[@]}"} &
step=$!

while true; do
    seen=$signals
    code=0
    wait "$step" || code=$?
    (( signals == seen )) && break # else the signal ended the wait, not the step
done

if (( signals > 0 && code != 0 )); then # 0: it was done before it had to stop
    scontrol requeue "$SLURM_JOB_ID" # same number, same output file; --resume auto goes on
    code=0
fi
exit "$code"
