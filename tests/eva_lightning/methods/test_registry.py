from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from eva_lightning.initialization import INITS
from eva_lightning.methods import METHODS, MethodKey, method_names

IN_THE_ORDER_OF_REPORTS = [
    "scratch", "linear", "fft", "lora", "dora", "rslora", "lora+", "adalora", "pissa", "milora", "olora", "ailora",
    "gaussian", "orthogonal", "orthonormal", "corda", "corda-kpm", "lora-ga", "lora-ga-peft", "lora-da", "lora-one",
    "gora", "eva", "eva-gradient", "eva-dora", "eva-whiten", "eva-lora-norm", "eva-rotate", "eva-permute",
    "eva-minor", "lora-redistribute", "eva-raw", "eva-max",
]  # fmt: skip
VISION_ALONE = {"linear", "ailora"}


@pytest.mark.parametrize(
    ("text", "method", "rho", "key", "label"),
    [
        ("fft", "fft", None, "fft", "FFT"),
        ("lora+", "lora+", None, "lora+", "LoRA+"),
        ("eva", "eva", 2.0, "eva", "EVA"),
        (" eva:2 ", "eva", 2.0, "eva", "EVA"),
        ("eva:1", "eva", 1.0, "eva:1", "EVA (ρ = 1)"),
        ("eva-dora:1.5", "eva-dora", 1.5, "eva-dora:1.5", "EVA+DoRA (ρ = 1.5)"),
        ("lora-redistribute:2.0", "lora-redistribute", 2.0, "lora-redistribute", "LoRA-redist"),
        ("eva-minor", "eva-minor", None, "eva-minor", "EVA-minor"),
    ],
)
def test_keys(text: str, method: str, rho: float | None, key: str, label: str) -> None:
    parsed = MethodKey.parse(text)
    assert (parsed.method, parsed.rho, parsed.key, parsed.label) == (method, rho, key, label)
    assert MethodKey.parse(parsed.key) == parsed
    assert len({parsed, MethodKey.parse(key)}) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("eva-dra", "unknown method 'eva-dra': did you mean eva-dora"),
        ("evaa:1", "unknown method 'evaa': did you mean eva"),
        ("", "unknown method ''"),
        ("lora:2", "lora has no rho, as it keeps ranks as they are, got lora:2"),
        ("eva-minor:1", "eva-minor has no rho"),
        ("eva:0.5", "the rho of eva must be a number of at least 1, got 0.5"),
        ("eva:nan", "the rho of eva must be a number of at least 1, got nan"),
        ("eva:inf", "the rho of eva must be a number of at least 1, got inf"),
        ("eva:", "what follows the colon in 'eva:' must be rho, a number of at least 1"),
        ("eva:two", "what follows the colon in 'eva:two' must be rho"),
    ],
)
def test_bad_keys_are_named(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        MethodKey.parse(text)


def test_every_method_in_the_order_of_reports() -> None:
    assert list(METHODS) == [method.name for method in METHODS.values()] == IN_THE_ORDER_OF_REPORTS
    assert list(method_names("vision")) == IN_THE_ORDER_OF_REPORTS[1:]
    assert list(method_names("rl")) == ["scratch", *[m for m in IN_THE_ORDER_OF_REPORTS[1:] if m not in VISION_ALONE]]


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_has_a_prepare_function(method: str) -> None:
    entry = METHODS[method]
    parameters = inspect.signature(entry.prepare_function()).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert [*parameters][:3] == ["module", "options", "where"]
    assert takes_any or set(entry.fixed) == set(parameters) - {"module", "options", "where"}
    assert entry.halves
    assert len({entry, METHODS["lora"]}) == 1 + (method != "lora")


def test_labels_are_those_of_the_papers_tables() -> None:
    table_20 = ["FFT", "LoRA", "AdaLoRA", "PiSSA", "OLoRA", "EVA", "DoRA", "EVA+DoRA"]
    table_25 = ["LoRA", "LoRA-redist", "EVA-whiten", "EVA-rot", "EVA-perm", "EVA"]
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels)
    assert {*table_20, *table_25, "EVA-minor", "MiLoRA", "CorDA", "LoRA-GA", "LoRA+", "rsLoRA"} < set(labels)


def test_which_methods_need_which_state() -> None:
    streaming = {name: method.state_kind for name, method in METHODS.items() if method.state_kind}
    # every initialisation of the decomposition has a method: no ablation is forgotten
    assert set(streaming) - {"eva", "eva-dora", "eva-raw", "eva-max"} == {
        "lora-redistribute" if init == "redistribute" else f"eva-{init}" for init in INITS if init != "eva"
    }
    assert {m for m, kind in streaming.items() if kind == "minor"} == {"eva-minor"}
    assert [m for m, method in METHODS.items() if not method.adapts] == ["scratch", "linear", "fft"]
    assert {m for m, method in METHODS.items() if method.redistributes} == {*streaming, "eva-gradient"} - {"eva-minor"}
    assert MethodKey.parse("eva:1.5").components(16) == 24
    assert MethodKey.parse("eva-minor").components(16) == 16
    assert MethodKey.parse("lora").components(16) == 0


def test_what_methods_ask_of_training_data() -> None:
    needs = {name: method.needs for name, method in METHODS.items() if method.needs != "nothing"}
    eva = {name: "inputs" for name, method in METHODS.items() if method.state_kind}
    gradients = dict.fromkeys(("lora-ga", "lora-ga-peft", "lora-one", "gora", "eva-gradient"), "gradients")
    assert needs == {
        "corda": "inputs", "corda-kpm": "inputs", "lora-da": "inputs and gradients", **gradients, **eva
    }  # fmt: skip


def test_names_are_known_before_torch_is() -> None:
    code = "import sys, eva_lightning.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
