from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from onnx import ModelProto, numpy_helper

from eva_lightning.errors import InputError
from tests.tools.dinov2_small.tiny import ARCHITECTURE, tiny_graph, tiny_tensors
from tools.dinov2_small.graph import Backbone
from tools.dinov2_small.release import Architecture
from tools.dinov2_small.self_check import relative_error


def backbone(model: ModelProto) -> Backbone:
    return Backbone(model.SerializeToString(), "a.onnx", ARCHITECTURE)


def renamed(model: ModelProto, names: dict[str, str]) -> None:
    """Give values of a graph other names, wherever they are used."""
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def test_the_tensors_are_those_that_the_graph_was_written_from_and_both_compute_the_same() -> None:
    tensors = tiny_tensors()
    found = backbone(tiny_graph(tensors))
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert 0 < relative_error(found, "a.onnx", ARCHITECTURE) < 1e-5


def test_made_up_names_do_not_matter() -> None:
    """Matrices are found by what the graph does with them: any permutation of their names gives the same tensors."""
    tensors = tiny_tensors()
    model = tiny_graph(tensors)
    anonymous = [tensor.name for tensor in model.graph.initializer if tensor.name.startswith("onnx::")]
    assert len(anonymous) == 2 * 6 + 2 + 1  # matrices, the position embedding, the decoder
    renamed(model, dict(zip(anonymous, reversed(anonymous), strict=True)))
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    found = backbone(model)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_names_that_lie_are_found_out() -> None:
    model, part = tiny_graph(tiny_tensors()), "backbone.encoder.layer.1.attention.attention."
    renamed(model, {f"{part}query.bias": f"{part}value.bias", f"{part}value.bias": f"{part}query.bias"})
    with pytest.raises(InputError, match=r"a\.onnx computes something else than tiny DINOv2 .* error is [\d.]+ where"):
        relative_error(backbone(model), "a.onnx", ARCHITECTURE)


def test_another_number_of_heads_is_found_out() -> None:
    with pytest.raises(InputError, match="computes something else"):
        relative_error(backbone(tiny_graph(tiny_tensors(), heads=4)), "a.onnx", ARCHITECTURE)


def test_a_graph_whose_result_is_not_finite_is_refused() -> None:
    tensors = tiny_tensors()
    tensors["norm.bias"][0] = float("nan")
    with pytest.raises(InputError, match=r"computes something else .* error is nan"):
        relative_error(backbone(tiny_graph(tensors)), "a.onnx", ARCHITECTURE)


def _without(name: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        renamed(model, {name: "another"})

    return change


def _reshaped(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("layer.1.mlp.fc1.bias"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:5], tensor.name))


def _half(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "backbone.layernorm.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))


def _elsewhere(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "backbone.layernorm.weight")
    tensor.data_location = tensor.EXTERNAL
    tensor.ClearField("raw_data")


def _without_values(model: ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


def _no_position(model: ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.name == "/backbone/embeddings/Add")
    node.op_type = "Mul"


REFUSED: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "no backbone": (_without("backbone.layernorm.bias"), r"it lacks 'backbone\.layernorm\.bias'"),
    "no class token": (_without("backbone.embeddings.cls_token"), r"it lacks 'backbone\.embeddings\.cls_token'"),
    "no position": (_no_position, r"it lacks 'backbone\.embeddings\.position_embeddings'"),
    "no query": (
        _without("backbone.encoder.layer.0.attention.attention.query.bias"),
        r"it lacks 'backbone\.encoder\.layer\.0\.attention\.attention\.query\.bias'",
    ),
    "misshapen": (_reshaped, r"'backbone\.encoder\.layer\.1\.mlp\.fc1\.bias' has shape \[5\] where \[32\] is needed"),
    "half precision": (_half, r"'backbone\.layernorm\.weight' is of type FLOAT16 where FLOAT is needed"),
    "another file": (_elsewhere, r"'backbone\.layernorm\.weight' lies in another file"),
    "no values": (_without_values, r"ONNX file a\.onnx is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_of_something_else_names_a_tensor(case: str) -> None:
    change, message = REFUSED[case]
    model = tiny_graph(tiny_tensors())
    change(model)
    with pytest.raises(InputError, match=message):
        backbone(model)


OTHERS: dict[str, tuple[dict[str, int], str]] = {
    "wider": (
        {"embed_dim": 16},
        r"'backbone\.embeddings\.cls_token' has shape \[1, 1, 16\] where \[1, 1, 8\] is needed",
    ),
    "shallower": ({"depth": 1}, r"it lacks 'backbone\.encoder\.layer\.1\.norm1\.weight'"),
    "deeper": ({"depth": 3}, r"it has the surplus 'backbone\.encoder\.layer\.2\.norm1\.weight', .* and 15 more"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_size_of_the_architecture_is_refused(case: str) -> None:
    changed, message = OTHERS[case]
    other = Architecture(patch=ARCHITECTURE.patch, grid=ARCHITECTURE.grid, options={**ARCHITECTURE.options, **changed})
    with pytest.raises(InputError, match=rf"^ONNX file a\.onnx is not of tiny DINOv2: {message}$"):
        backbone(tiny_graph(tiny_tensors(other)))


def test_a_cut_file_is_refused_wherever_it_ends() -> None:
    content = tiny_graph(tiny_tensors()).SerializeToString()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(InputError, match=r"ONNX file a\.onnx is (damaged|not of tiny DINOv2)"):
            Backbone(content[:length], "a.onnx", ARCHITECTURE)
