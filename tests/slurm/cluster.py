"""A real Slurm with virtual nodes on this machine, with its own daemons, ports and keys, for one block."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from ports import free_port
from waiting import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
SETTINGS = """\
ClusterName=vcrd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the lifetime of a credential, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def why_not() -> str | None:
    """Why no cluster can run on this machine, or None."""
    missing = [name for name in DAEMONS if not _path_of(name)]
    if missing:
        return f"Slurm is not installed: there is no {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return None


class Cluster:
    """Virtual nodes n1, n2 ... with the partitions "all" and "urgent", whose jobs pre-empt those of "all"."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: list[subprocess.Popen] = []
        # Without VCRD_ADDRESS or SLURM_JOB_ID of the user who runs the tests.
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "VCRD"))
        } | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        text = SETTINGS.format(host=host, port=free_port(), user=getpass.getuser(), folder=self.folder)
        for node in self.nodes:
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            text += "CPUs=8 RealMemory=4000\n"
        for partition, priority in (("all", 1), ("urgent", 2)):
            text += f"PartitionName={partition} Nodes={','.join(self.nodes)} PriorityTier={priority} "
            text += f"Default={'YES' if partition == 'all' else 'NO'} MaxTime=60 GraceTime=60\n"
        (self.folder / "slurm.conf").write_text(text)
        try:
            munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
            wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged listens")
            self._start("slurmctld", "-D", "-c")
            for node in self.nodes:
                self.boot(node)
            wait_until(lambda: set(self.states().values()) == {"idle"}, 60, "every node is idle", self.states)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if len(self._daemons) > 1:
                subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self._environment, timeout=30)
                wait_until(lambda: not self.run("squeue", "--noheader"), 60, "every job has ended")
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def run(self, *command: str, cwd: Path | None = None, seconds: float = 60, **environment: str) -> str:
        """Runs a command as a user of the cluster, and returns its output. The command must succeed."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self._environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """The state of each node: "idle", "allocated", "down" ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=all", "--format=%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def resume(self, node: str) -> None:
        """Resumes a node that is down. Its daemon may report meanwhile, and then Slurm refuses to resume it."""
        try:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        except AssertionError:
            if self.states()[node].startswith("down"):
                raise

    def job(self, number: str) -> str:
        """The state of a job: "PENDING", "RUNNING", "COMPLETED" ..."""
        text = self.run("scontrol", "show", "job", "--oneliner", number).split("\n")[0]
        return text.split("JobState=")[1].split()[0]

    def nodes_of(self, number: str) -> list[str]:
        """The nodes of a running job."""
        found = self.run("squeue", "--noheader", "--format=%N", f"--jobs={number}").split("\n")
        return self.run("scontrol", "show", "hostnames", ",".join(filter(None, found))).split()

    def boot(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._start("slurmd", "-D", "-N", node)

    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self._daemons.append(
                subprocess.Popen(
                    # They also end if this process ends in any way.
                    ["setpriv", "--pdeathsig", "TERM", _path_of(name), *arguments],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )


def _path_of(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
