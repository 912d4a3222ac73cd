"""How model servers' commands are phrased."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.engines.base import Placement
from tidegate_lifecycle.engines.llamacpp import LlamaCppEngine, source
from tidegate_lifecycle.engines.vllm import VllmEngine

DECLARED = Device("gpu0", "default", 24576, 22000, None, "", "", None)
CARDS = tuple(
    Device(str(i), "default", total, total, i, f"GPU-{i}", "H200", 0)
    for i, total in enumerate((81920, 81559))
)
VLLM = Model(
    "chat",
    engine="vllm",
    source="Qwen/Qwen3-8B",
    aliases=("chat-latest", "gpt"),
    max_model_len=8192,
    max_num_seqs=16,
    dtype="bfloat16",
    quantization="fp8",
    tokenizer="Qwen/T",
    extra_args=("--enforce-eager",),
    env={"A": "1", "CUDA_VISIBLE_DEVICES": "7"},
)


def place(*devices: Device, reserved: int = 10240) -> Placement:
    """A place on some devices."""
    return Placement("127.0.0.1", 9000, devices, reserved)


def test_a_command_gets_its_placeholders_filled_and_nothing_else() -> None:
    """{port}, {name} and {devices} are put in, as often as they stand there; other braces stay."""
    model = Model(
        "a/b", command=("srv", "--p={port}", "{name}:{port}", "{devices}", '{"x": {y}}'), env={"K": "v"}
    )
    made = ENGINES["command"].command(model, place(*CARDS))
    assert made.argv == ("srv", "--p=9000", "a/b:9000", "0,1", '{"x": {y}}')
    assert made.env == {"K": "v", "CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}
    upstream = replace(model, upstream_model="known-as")
    assert ENGINES["command"].command(upstream, place(DECLARED)).argv[2:4] == ("known-as:9000", "gpu0")
    assert ENGINES["command"].command(model, place(DECLARED)).env == {"K": "v"}


def test_vllm_is_bound_to_what_was_reserved() -> None:
    """Its share is rounded down, over the smallest card; parallel over as many cards as it was given."""
    made = VllmEngine({"HF_TOKEN": "t", "OTHER": "x"}, gpu=False).command(VLLM, place(*CARDS))
    assert made.argv == (
        *("vllm", "serve", "Qwen/Qwen3-8B", "--host", "127.0.0.1", "--port", "9000"),
        *("--served-model-name", "chat", "chat-latest", "gpt", "--gpu-memory-utilization", "0.1255"),
        *("--tensor-parallel-size", "2", "--max-model-len", "8192", "--max-num-seqs", "16"),
        *("--dtype", "bfloat16", "--quantization", "fp8", "--tokenizer", "Qwen/T", "--enforce-eager"),
    )
    assert made.env == {"HF_TOKEN": "t", "A": "1", "CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}


@pytest.mark.parametrize(
    ("gpu", "reserved", "given"), [(True, 12288, True), (False, 12288, False), (True, 0, False)]
)
def test_vllm_on_declared_cards_is_bound_where_there_are_real_ones(
    gpu: bool, reserved: int, given: bool
) -> None:
    """Without any card the flag means the host's memory; without a reservation there is nothing to say."""
    plain = Model("m", engine="vllm", source="~/models/x", executable="/opt/vllm", upstream_model="u")
    argv = VllmEngine({}, gpu).command(plain, place(DECLARED, reserved=reserved)).argv
    assert argv[:3] == ("/opt/vllm", "serve", str(Path("~/models/x").expanduser()))
    assert argv[argv.index("--served-model-name") :][1:3] == ("m", "u")
    assert (argv[-4:-2] == ("--gpu-memory-utilization", "0.5000")) == given
    assert "--tensor-parallel-size" not in argv


def test_llama_server_gets_context_for_each_slot() -> None:
    """Its context is shared, so it is as large as all slots together; layers go to real cards."""
    model = Model("m", engine="llamacpp", source="x.gguf", max_model_len=4096, max_num_seqs=4)
    made = LlamaCppEngine({}).command(model, place(CARDS[0]))
    assert made.argv == (
        *("llama-server", "-m", "x.gguf", "--host", "127.0.0.1", "--port", "9000", "--alias", "m"),
        *("-c", "16384", "-np", "4", "--metrics", "-ngl", "999"),
    )
    assert "-ngl" not in LlamaCppEngine({}).command(model, place(DECLARED)).argv


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("/m/x.gguf", ["-m", "/m/x.gguf"]),
        ("models/x.gguf", ["-m", "models/x.gguf"]),
        ("./a/b/c.gguf", ["-m", "./a/b/c.gguf"]),
        ("org/repo/x.gguf", ["--hf-repo", "org/repo", "--hf-file", "x.gguf"]),
        ("org/repo/Q4/x.gguf", ["--hf-repo", "org/repo", "--hf-file", "Q4/x.gguf"]),
        ("org/repo-GGUF", ["-hf", "org/repo-GGUF"]),
        ("org/repo:Q4_K_M", ["-hf", "org/repo:Q4_K_M"]),
        ("https://h/x.gguf", ["--model-url", "https://h/x.gguf"]),
    ],
)
def test_gguf_sources_are_told_apart(text: str, arguments: list[str]) -> None:
    """Files, URLs, files of repositories and repositories each have their own flag."""
    assert source(text) == arguments


def test_in_a_container_commands_are_the_images_own() -> None:
    """Cards aren't named by number there, paths are the container's, and images bring their program."""
    placement = Placement("0.0.0.0", 8000, CARDS[:1], 10240)
    vllm = replace(VLLM, image="vllm:1", source="~/x", env={"A": "1"})
    made = VllmEngine({"HF_TOKEN": "t"}, gpu=False).command(vllm, placement)
    assert made.argv[:7] == ("vllm", "serve", "~/x", "--host", "0.0.0.0", "--port", "8000")
    assert made.env == {"HF_TOKEN": "t", "A": "1"}
    assert (made.hub, made.image_entrypoint) == (True, False)
    gguf = Model("m", engine="llamacpp", source="/models/x.gguf", image="llama:1")
    made = LlamaCppEngine({}).command(gguf, placement)
    assert made.argv[:4] == ("-m", "/models/x.gguf", "--host", "0.0.0.0")
    assert (made.hub, made.image_entrypoint) == (True, True)
    made = LlamaCppEngine({}).command(replace(gguf, executable="/opt/server"), placement)
    assert (made.argv[0], made.image_entrypoint) == ("/opt/server", False)
    made = ENGINES["command"].command(Model("c", command=("srv", "{port}"), image="i"), placement)
    assert (made.argv, made.env, made.hub, made.image_entrypoint) == (("srv", "8000"), {}, False, False)


@pytest.mark.parametrize("engine", ["command", "vllm", "llamacpp"])
def test_a_signature_changes_with_image_and_volumes(engine: str) -> None:
    """Another image is another server; a process has none, and its signature is what it ever was."""
    plain = Model("m", engine=engine, source="s", command=("a",))
    contained = replace(plain, image="i:1")
    signatures = {
        ENGINES[engine].signature(model)
        for model in (
            plain,
            contained,
            replace(contained, image="i:2"),
            replace(contained, volumes=("a:/a",)),
        )
    }
    assert len(signatures) == 4


def test_external_servers_have_no_command() -> None:
    """What runs elsewhere is never started."""
    with pytest.raises(ValueError, match="runs elsewhere"):
        ENGINES["external"].command(Model("o", engine="external", urls=("http://h",)), place())


@pytest.mark.parametrize(
    "change",
    [
        {"source": "other"},
        {"env": {"A": "2"}},
        {"extra_args": ()},
        {"kv_reservation_seqs": 2},
        {"kv_cache_dtype": "fp8"},
        {"upstream_model": "u"},
        {"max_num_seqs": 8},
        {"vram_mib": 1},
        {"executable": "vllm2"},
    ],
)
def test_a_signature_changes_with_what_shapes_the_server(change: dict[str, object]) -> None:
    """A restarted service must see that a running server is no longer the configured one."""
    engine = ENGINES["vllm"]
    assert engine.signature(replace(VLLM, **change)) != engine.signature(VLLM)  # type: ignore[arg-type]


def test_a_signature_stays_with_what_does_not_touch_the_server() -> None:
    """Limits and times are the service's own: changing them restarts nothing."""
    changed = replace(
        VLLM,
        idle_timeout=1.0,
        max_concurrent=3,
        max_queue=3,
        instances=2,
        request_defaults={"a": 1},
        aliases=(),
    )
    assert ENGINES["vllm"].signature(changed) == ENGINES["vllm"].signature(VLLM)
    command = Model("m", command=("a",))
    assert ENGINES["command"].signature(replace(command, aliases=("x",), vram_mib=5)) == ENGINES[
        "command"
    ].signature(command)


def test_vllm_is_told_how_many_sequences_it_works_on() -> None:
    """Its memory depends on it, and its own default on release and card."""
    plain = Model("m", engine="vllm", source="a/b")
    for model, told in (
        (replace(plain, max_num_seqs=16), "16"),
        (plain, "256"),
        (replace(plain, max_concurrent=300), "300"),
    ):
        argv = VllmEngine({}, gpu=False).command(model, place(DECLARED)).argv
        assert argv[argv.index("--max-num-seqs") + 1] == told


def test_slots_follow_the_sequences() -> None:
    """A vllm model has two slots more than sequences; others say nothing."""
    assert ENGINES["vllm"].default_slots(VLLM) == 18
    assert ENGINES["vllm"].default_slots(replace(VLLM, max_num_seqs=None)) is None
    assert ENGINES["command"].default_slots(VLLM) is None


def test_owned_flags_are_found_however_they_are_written() -> None:
    """`--flag value`, `--flag=value`, underscores and short forms with a number are the same flag."""
    flags = ENGINES["vllm"].flags
    for given in (
        "--port",
        "--gpu_memory_utilization=0.9",
        "-tp2",
        "-tp=2",
        "--port=1",
        "-q",
        "--kv_cache_dtype",
    ):
        assert flags.instead(given), given
    for given in (
        "0.5",
        "--enforce-eager",
        "--max-num-batched-tokens",
        "-cc",
        "-O3",
        "--no-async-scheduling",
    ):
        assert flags.instead(given) is None, given
    assert flags.instead("--max-model-len") == "use the key max_model_len"
    assert ENGINES["command"].flags.instead("--port") is None
    assert ENGINES["llamacpp"].flags.instead("-np") == "use the key max_num_seqs"
    assert ENGINES["llamacpp"].flags.instead("--no-warmup") is None


@pytest.mark.parametrize(
    "given",
    [
        *("--gpu_memory_util", "--max-model", "--tensor-par=2", "-qfp8", "--no-enable-sleep-mode"),
        *(
            "--no-data-parallel-hybrid-lb",
            "--kv-cache-memory",
            "--shutdown-time",
            "--device-memory-utilization",
        ),
    ],
)
def test_owned_flags_of_vllm_are_found_as_argparse_takes_them(given: str) -> None:
    """Shortened, negated, or with the value attached: vLLM accepts each of these (seen with 0.32)."""
    assert ENGINES["vllm"].flags.instead(given)


def test_the_cache_type_reaches_both_engines() -> None:
    """As each of them says it."""
    model = replace(VLLM, kv_cache_dtype="fp8", quantization="")
    argv = VllmEngine({}, gpu=False).command(model, place(DECLARED)).argv
    assert argv[argv.index("--kv-cache-dtype") + 1] == "fp8"
    gguf = Model("g", engine="llamacpp", source="/m.gguf", kv_cache_dtype="q8_0")
    assert LlamaCppEngine({}).command(gguf, place(DECLARED)).argv[-5:] == (
        *("-ctk", "q8_0", "-ctv", "q8_0", "--metrics"),
    )
