"""Starting one process: its environment, its files, and how its end is put in words. Called in a thread."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.records import VARIABLE

_KEPT_VARIABLES = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "VIRTUAL_ENV",
        "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "DO_NOT_TRACK",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
    }
)
_KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What servers get of this process' environment: what programs need to run, no secrets, no settings.

    Programs that were installed beside this one are found, even when its folder isn't on the PATH.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }
    own = os.path.dirname(sys.executable)
    return kept | {"PATH": os.pathsep.join([kept.get("PATH", os.defpath), own])}


def spawn(spec: StartSpec, output_file: Path, environ: Mapping[str, str]) -> int:
    """Starts the process as leader of a new session, appending to its log; gives its pid.

    Raises OSError or ValueError when it can't.
    """
    env = base_environment(environ) | dict(spec.env) | {VARIABLE: spec.instance_id}
    if not os.path.dirname(spec.argv[0]) and not shutil.which(spec.argv[0], path=env.get("PATH")):
        raise FileNotFoundError(2, "not found", spec.argv[0])
    output = os.open(output_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            spec.argv,
            cwd=spec.cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    finally:
        os.close(output)
    child.returncode = 0  # it is waited for by pidfd; Popen would warn when it is collected
    return child.pid


def reap(pid: int) -> str:
    """How a child of ours ended."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return "ended"
    if reaped == 0:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def why(error: OSError | ValueError, spec: StartSpec) -> str:
    """For callers: the program's own name is no secret, where it lies is."""
    program = os.path.basename(spec.argv[0])
    if isinstance(error, FileNotFoundError):
        missing = "the working directory" if not spec.cwd.is_dir() else f"the program {program}"
        return f"{missing} was not found"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return f"the data directory can't be written: {error.strerror}"
    if isinstance(error, PermissionError):
        return f"the program {program} may not be run"
    return f"the program {program} can't be started: {getattr(error, 'strerror', None) or 'invalid command'}"
