"""A real SLURM on the loopback interface: munged, slurmctld, and two slurmd as the nodes `one` and `two`.

Everything lies in a folder of its own under ports of its own, so that it disturbs no SLURM that the machine may have.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
WHY_NOT = f"no SLURM here, {', '.join(MISSING)} missing (Debian: apt-get install slurm-wlm munge)"

# Two nodes of four CPUs and two GPUs each, whatever the machine has. `cred_expire` is also how long a job that queues
# again waits before it can start: two minutes unless it is set, and 6 s is the least.
_CONF = """
ClusterName=mcit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=2,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=1
MinJobAge=7200
NodeName=one NodeHostname=localhost NodeAddr=127.0.0.1 Port={one} CPUs=4 Gres=gpu:2
NodeName=two NodeHostname=localhost NodeAddr=127.0.0.1 Port={two} CPUs=4 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=work Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""


@contextmanager
def slurm_cluster() -> Iterator[Path]:
    """The cluster, running until the block ends; yields the configuration that SLURM_CONF must name."""
    folder = Path(tempfile.mkdtemp(prefix="mcit-slurm-", dir="/tmp"))  # short: munged's socket is in it
    folder.chmod(0o755)  # munged insists
    ports = dict(zip(("port", "one", "two"), _free_ports(3), strict=True))
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, user=getpass.getuser(), **ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # GPUs only in name
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_daemon(folder, "munged", "--foreground", f"--key-file={folder}/key", *files))
        stack.enter_context(_daemon(folder, "slurmctld", "-D"))
        for node in ("one", "two"):
            stack.enter_context(_daemon(folder, "slurmd", "-D", "-N", node))
        wait_for(lambda: _ask(conf, "sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"], 300)
        yield conf
        _ask(conf, "scancel", f"--user={getpass.getuser()}")
        wait_for(lambda: not _ask(conf, "squeue", "--noheader").strip(), 300)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@contextmanager
def _daemon(folder: Path, *command: str) -> Iterator[None]:
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    orphaned = ["setpriv", "--pdeathsig", "TERM"]  # it ends with this process, whatever ends that
    with open(folder / "daemons.log", "ab") as log:
        daemon = subprocess.Popen([*orphaned, *command], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _ask(conf: Path, *command: str) -> str:
    return subprocess.run(command, env=os.environ | {"SLURM_CONF": str(conf)}, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
