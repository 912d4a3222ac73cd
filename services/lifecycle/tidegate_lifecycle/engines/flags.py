"""Flags that the service sets itself, or that would undo its work: no `extra_args`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Flags:
    """An engine's owned flags, and how its command line is read."""

    owned: Mapping[str, str]
    """Each with what to do instead, for people."""
    argparse: bool = False
    """Long flags may be shortened, `--no-` says the opposite, values may stick to short ones."""

    def instead(self, argument: str) -> str | None:
        """What to do instead of an argument that is, or sets, an owned flag; None = it is the user's.

        `--flag`, `--flag=x`, `--fl_ag` and `-f4` are the same flag; with argparse also `--no-flag`, any
        beginning of it, `--flag.key` and `-fx`.
        """
        flag = argument.partition("=")[0]
        if not flag.startswith("-"):
            return None
        long = flag.replace("_", "-") if flag.startswith("--") else flag.rstrip("0123456789")
        for name in (flag, long):
            if name in self.owned:
                return self.owned[name]
        return self._loosely(long) if self.argparse else None

    def _loosely(self, flag: str) -> str | None:
        if not flag.startswith("--"):
            return next(
                (told for name, told in self.owned.items() if len(name) == 2 and flag[:2] == name), None
            )
        flag = flag.partition(".")[0]
        plain = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag
        if len(plain) < 4:
            return None
        return next(
            (told for name, told in self.owned.items() if name == plain or name.startswith(plain)), None
        )


def table(text: str) -> dict[str, str]:
    """Owned flags from lines `what to do instead: --flag -f ...`."""
    rows = (line.split(":", 1) for line in text.strip().splitlines())
    return {flag: told.strip() for told, flags in rows for flag in flags.split()}


VLLM = Flags(
    table("""
        use the key source: --model
        use the key tokenizer: --tokenizer
        use the keys aliases and upstream_model: --served-model-name
        use the key max_model_len: --max-model-len
        use the key max_num_seqs: --max-num-seqs
        use the key dtype: --dtype
        use the key quantization: --quantization -q
        use the key kv_cache_dtype: --kv-cache-dtype
        use the key vram: --gpu-memory-utilization --device-memory-utilization
        use the keys vram and kv_reservation_seqs: --kv-cache-memory-bytes --num-gpu-blocks-override
        use the key tensor_parallel_size: --tensor-parallel-size -tp --pipeline-parallel-size -pp
        use the key tensor_parallel_size: --prefill-context-parallel-size -pcp --nnodes -n --node-rank -r
        use the key tensor_parallel_size: --device-ids
        use the key instances: --data-parallel-size -dp --data-parallel-size-local -dpl --data-parallel-rank
        use the key instances: -dpn --data-parallel-start-rank -dpr --data-parallel-address -dpa
        use the key instances: --data-parallel-rpc-port -dpp --data-parallel-backend -dpb
        use the key instances: --data-parallel-hybrid-lb -dph --data-parallel-external-lb -dpe
        use the key instances: --data-parallel-multi-port-external-lb -dpm --data-parallel-supervisor-port
        use the key lifecycle.drain_timeout: --shutdown-timeout
        set HF_TOKEN in the environment: --hf-token
        use the model's own keys: --config
        it decides where and how servers listen: --host --port --uds --root-path --headless --grpc --grpc-port
        it decides where and how servers listen: --api-server-count -asc
        the edge checks callers' keys: --api-key --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs
        there is no sleep mode yet: --enable-sleep-mode
    """),
    argparse=True,
)
LLAMA_CPP = Flags(
    table("""
        use the key source: -m --model -mu --model-url -hf -hfr --hf-repo -hff --hf-file --models-dir
        use the keys aliases and upstream_model: --alias -a
        use the key max_model_len: -c --ctx-size
        use the key max_num_seqs: -np --parallel
        set HF_TOKEN in the environment: -hft --hf-token
        it decides where and how servers listen: --host --port --api-prefix --metrics
        the edge checks callers' keys: --api-key --api-key-file --ssl-key-file --ssl-cert-file
    """)
)
NONE = Flags({})
