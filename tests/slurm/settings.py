"""The files of the test cluster: slurm.conf and its relatives, host names, the database's accounts."""

from __future__ import annotations

from pathlib import Path

CONTROLLER = "controller"
SUBNET = "198.18.77"  # RFC 2544, for tests of networks: neither private nor routed
CPUS, GPUS, MEMORY_MB = 16, 4, 64000  # of a node, all pretended
STATE = Path("/run/cluster")  # in the cluster's own /run
REQUEUE_WAIT_SECONDS = 8
GRACE_SECONDS = 40

_SLURM_CONF = f"""\
ClusterName=test
SlurmctldHost={CONTROLLER}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s otherwise)
AuthInfo=cred_expire={REQUEUE_WAIT_SECONDS}
CredType=cred/munge
StateSaveLocation={STATE}/controller
SlurmdSpoolDir={STATE}/spool-%n
SlurmctldPidFile={STATE}/slurmctld.pid
SlurmdPidFile={STATE}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# without cgroups, the accounting of memory needs this plugin
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={CONTROLLER}
AccountingStorageTRES=gres/gpu
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# believe the CPUs and memory below, although this machine has less
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
# a node that is silent for so long is down, and its jobs are requeued
SlurmdTimeout=10
JobRequeue=1
# from SIGTERM to SIGKILL, as Slurm's own default
KillWait=30
MessageTimeout=20
BatchStartTimeout=20
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=3
# partition "urgent" preempts "main": the job's own --signal first, then GraceTime, then requeue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MailProg=/bin/true
DefMemPerCPU=1000
"""

_SLURMDBD_CONF = f"""\
AuthType=auth/munge
DbdHost={CONTROLLER}
SlurmUser=root
PidFile={STATE}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""

DATABASE_ACCOUNTS = """\
CREATE DATABASE IF NOT EXISTS slurm;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY 'slurm';
GRANT ALL ON slurm.* TO slurm@'127.0.0.1';
GRANT ALL ON slurm.* TO slurm@localhost;
"""


def node_name(number: int) -> str:
    """Name of node ``number``, from 1 on."""
    return f"node{number}"


def node_address(number: int) -> str:
    """IPv4 address of that node."""
    return f"{SUBNET}.{number}"


def controller_address() -> str:
    """IPv4 address of the controller."""
    return f"{SUBNET}.254"


def hosts(nodes: int) -> str:
    """/etc/hosts of every machine of the cluster."""
    lines = ["127.0.0.1 localhost", f"{controller_address()} {CONTROLLER}"]
    lines += [f"{node_address(number)} {node_name(number)}" for number in range(1, nodes + 1)]
    return "\n".join(lines) + "\n"


def write_etc(folder: Path, nodes: int) -> None:
    """Write the content of /etc/slurm into ``folder``."""
    folder.mkdir(parents=True)
    lines = [
        f"NodeName={node_name(number)} NodeAddr={node_address(number)} CPUs={CPUS} Sockets=1 CoresPerSocket={CPUS} "
        f"ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        for number in range(1, nodes + 1)
    ]
    lines += [
        f"PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime={GRACE_SECONDS}",
        "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    (folder / "slurm.conf").write_text(_SLURM_CONF + "\n".join(lines) + "\n")
    # Slurm loads a cgroup plugin even where none is used, and looks for a mounted hierarchy unless one is named.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={STATE}/gpu[0-{GPUS - 1}]\n")
    database = folder / "slurmdbd.conf"
    database.touch(mode=0o600)  # slurmdbd refuses a file that others can read
    database.write_text(_SLURMDBD_CONF)
