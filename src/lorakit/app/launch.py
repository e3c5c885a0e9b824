"""`lorakit train --nproc N`: the same command in N processes of torchrun's, ended as one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lorakit.errors import Interrupted, RankError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on; of one that torchrun does not handle, it dies alone
SHUTDOWN_S = 60  # from a signal until the processes are killed; they need a step, or a batch of answers, and a save


def launch(words: Sequence[str], nproc: int) -> None:
    """Run `lorakit WORDS` in `nproc` processes of this machine and wait for them.

    Raises:
        RankError: one failed, and has said why; with its exit code, or 128 and the signal that killed it. After a
            signal to this process, with the exit code of what can be resumed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes speak for themselves
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    options = {"nproc-per-node": nproc, "signals-to-handle": SIGNALS, "shutdown-timeout": SHUTDOWN_S}
    told = parse_args(["--standalone", *(f"--{name}={value}" for name, value in options.items()), "-m", "lorakit"])
    told.training_script_args = list(words)  # which argparse would look through for options of its own
    try:
        run(told)
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        raise RankError(f"process {rank} failed", code) from err
    except SignalException as err:
        raise RankError(f"ended by {err.sigval.name}", Interrupted.exit_code) from err
