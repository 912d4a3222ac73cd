"""What went wrong between us and a hub, in words for callers: no tokens, no addresses, no paths."""

from __future__ import annotations

import errno


class HubFailed(Exception):
    """Something can't be had from the hub. Its text is for callers and says what to do."""


class Unreachable(HubFailed):
    """Nobody answered, or not in time, or the hub is in trouble itself: later it may work."""


class Refused(HubFailed):
    """The hub wants a token, or another one."""


class Missing(HubFailed):
    """There is no such repository or file."""


class Unwritable(HubFailed):
    """The cache can't be written: the disk is full, read-only, or not ours."""


def refused(repo: str, token: bool) -> Refused:
    """The repository is gated or private."""
    if token:
        how = "accept its terms on the hub with the token's account, or set HF_TOKEN to another token"
        return Refused(f"the hub refuses {repo} to the service's token: {how}")
    how = "accept its terms on the hub and set HF_TOKEN in the service's environment"
    return Refused(f"{repo} is gated or private and the service has no token: {how}")


def no_repo(repo: str, token: bool) -> Missing:
    """Not there, or hidden: the hub doesn't tell which."""
    hidden = "or hidden from the service's token" if token else "or private: then set HF_TOKEN"
    return Missing(f"the hub has no repository {repo}, {hidden}; check the model's source")


def no_file(repo: str, file: str) -> Missing:
    """The repository lacks it."""
    return Missing(f"the repository {repo} has no file {file}; check the model's source")


def unreachable(repo: str) -> Unreachable:
    """No answer, and nothing in the cache."""
    how = "check the network and HF_ENDPOINT"
    return Unreachable(f"the hub can't be reached and {repo} is not in the cache; {how}")


def offline(repo: str) -> Unreachable:
    """We were told not to ask."""
    how = "unset it, or download the model first"
    return Unreachable(f"{repo} is not in the cache and HF_HUB_OFFLINE is set: {how}")


def in_trouble(repo: str, status: int) -> Unreachable:
    """It answered, with an error of its own."""
    why = "limits the number of requests" if status == 429 else f"has a problem (it answers {status})"
    return Unreachable(f"the hub {why} and {repo} is not in the cache; it is tried again at the next start")


def unwritable(error: OSError) -> Unwritable:
    """For people: what the system says, without the path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unwritable("the disk of the hub's cache is full; make room there (lifecycle.hf_cache)")
    reason = error.strerror or type(error).__name__
    return Unwritable(f"the hub's cache can't be used ({reason}); check lifecycle.hf_cache")


def of_disk(error: OSError) -> bool:
    """Whether it is about files: errors of connections are OSErrors too."""
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
