"""Pods without Kubernetes: each has network, mounts and processes of its own, and its pod's files, user and rights.

Needs root, and has to run inside namespaces of its own (`unshare --net --mount --pid`), so that nothing is left behind.
The image is this machine's root with the virtual environment at /opt/antiphon, below a layer that is thrown away.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.sessions.embedded import find_binary
from tests.manifests.kustomize import ROOT
from tests.manifests.model import Cluster, Doc, Pod

BRIDGE = "10.77.0.1"
_WORK = Path("/run/pods")


def sh(command: str) -> None:
    """Runs a command line; raises if it fails."""
    subprocess.run(command, shell=True, check=True)


def prepare() -> None:
    """The network between the pods, and a place for what they write."""
    sh("mount -t tmpfs pods /run && ip link set lo up")
    sh(f"ip link add pods type bridge && ip addr add {BRIDGE}/24 dev pods && ip link set pods up")
    _WORK.mkdir()


class Machine:
    """One pod. `start` runs its command, `run` another one beside it, both as its user and in its namespaces."""

    def __init__(self, number: int, pod: Pod, cluster: Cluster, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self.name = f"{pod.name}-{number}"
        self.address = f"10.77.0.{number + 10}"
        self.pod = pod
        self._cluster = cluster
        self._secrets = secrets
        self._root = _WORK / self.name / "root"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = _WORK / self.name / "log"
        self._connect(number)
        self._build()

    def start(self, command: str, environment: Mapping[str, str], hosts: Mapping[str, str]) -> None:
        """Starts the pod's own command (a line for bash). hosts: name -> address."""
        (self._root / "etc/hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{v} {k}\n" for k, v in hosts.items()))
        mounts = [f"mount -o remount,ro {self._root}"]
        mounts += [f"mount -t tmpfs -o mode=1777 t {self._root}{path}" for path in (*self._writable(), "/dev/shm")]
        mounts += [f"mount -t proc proc {self._root}/proc", f"mount -t sysfs -o ro sysfs {self._root}/sys"]
        mounts += [f"exec {self._entered(command, environment)}"]
        line = " && ".join(mounts)
        apart = f"exec ip netns exec {self.name} unshare --mount --pid --fork --kill-child sh -c {shlex.quote(line)}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                apart, shell=True, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Runs another command in the running pod, as an exec probe or a preStop hook does; its exit status."""
        child = self._first_process()
        if child is None:
            return 1
        entered = shlex.quote(self._entered(shlex.join(command), environment))
        return subprocess.run(f"nsenter -t {child} -m -p -n sh -c {entered}", shell=True, check=False).returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _first_process(self) -> int | None:
        """The child of `unshare`, which is the first process of the pod; None before there is one."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it may be gone by now
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                if self._process is not None and parent == self._process.pid:
                    return int(path.parent.name)
        return None

    def _connect(self, number: int) -> None:
        sh(f"ip netns add {self.name} && ip link add v{number} type veth peer name eth0 netns {self.name}")
        sh(f"ip link set v{number} master pods up && ip -n {self.name} link set lo up")
        sh(f"ip -n {self.name} addr add {self.address}/24 dev eth0 && ip -n {self.name} link set eth0 up")
        sh(f"ip -n {self.name} route add default via {BRIDGE}")

    def _build(self) -> None:
        """The root: this machine's, the image's paths, the pod's volumes."""
        folder = self._root.parent
        for name in ("root", "upper", "work"):
            (folder / name).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
        sh(f"mount -t overlay pod -o {layers} {self._root} && mount --rbind /dev {self._root}/dev")
        sh(f"mount --make-rslave {self._root}/dev && chmod 755 {self._root}/root")
        (self._root / "opt").mkdir(exist_ok=True)
        (self._root / "opt/antiphon").symlink_to(Path(sys.prefix))
        for name, binary in {"valkey-server": find_binary(), "valkey-cli": shutil.which("redis-cli")}.items():
            (self._root / "usr/local/bin" / name).symlink_to(binary or "/bin/false")
        for mount in self.pod.main.get("volumeMounts") or []:
            place = self._root / mount["mountPath"].lstrip("/")
            if mount["mountPath"] not in self._writable():
                shutil.rmtree(place, ignore_errors=True)  # a mount hides what the image has there
            place.mkdir(parents=True, exist_ok=True)
            volume = next((each for each in self.pod.spec["volumes"] if each["name"] == mount["name"]), {})
            for source in (volume.get("projected") or {}).get("sources") or [volume]:
                self._fill(place, source, volume)

    def _fill(self, place: Path, source: Doc, volume: Doc) -> None:
        """The files of a Secret or ConfigMap, with the owner and mode that Kubernetes gives them."""
        kind = "secret" if "secret" in source else "configMap" if "configMap" in source else None
        if kind is None:
            return
        name = source[kind].get("secretName") or source[kind]["name"]
        config = self._cluster.named("ConfigMap", name)
        data: Mapping[str, Any] = self._secrets[name] if kind == "secret" else (config or {}).get("data") or {}
        mode = (volume.get("projected") or volume[kind]).get("defaultMode", 0o644)
        for item in source[kind].get("items") or [{"key": key, "path": key} for key in data]:
            path = place / item["path"]
            path.write_text(data[item["key"]])
            os.chown(path, 0, self.pod.spec["securityContext"]["fsGroup"])
            path.chmod(mode)

    def _writable(self) -> list[str]:
        """Mounts that are neither Secret nor ConfigMap: empty folders and claims."""
        volumes = {each["name"]: each for each in self.pod.spec.get("volumes") or []}
        fixed = {"secret", "configMap", "projected"}
        mounts = self.pod.main.get("volumeMounts") or []
        return [each["mountPath"] for each in mounts if not fixed & set(volumes.get(each["name"], {}))]

    def _entered(self, command: str, environment: Mapping[str, str]) -> str:
        """A command in the pod's root, as its user, without capabilities."""
        context = self.pod.spec["securityContext"]
        user, group, files = context["runAsUser"], context["runAsGroup"], context["fsGroup"]
        rights = f"--reuid {user} --regid {group} --groups {files} --bounding-set=-all --inh-caps=-all --no-new-privs"
        variables = " ".join(shlex.quote(f"{key}={value}") for key, value in environment.items())
        inside = f"cd /tmp 2>/dev/null; {command}"
        return f"chroot {self._root} setpriv {rights} env -i {variables} bash -c {shlex.quote(inside)}"


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets, and this tree as the package."""
    lines = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [word for line in lines if line.startswith("ENV ") for word in line.split()[1:]]
    given = dict(word.split("=", 1) for word in words)
    path = given["PATH"].replace("$PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return given | {"PATH": path, "PYTHONPATH": str(ROOT)}
