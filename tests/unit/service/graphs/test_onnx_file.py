"""Reading .onnx files: every node wherever it stands, values, and what lies outside; what is refused of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.errors import LoadError
from service.graphs.graph import Port
from service.graphs.onnx_file import SEAL_KEY, OnnxFile, check_seal, check_size, may_have_external_data, seal
from tests.any_graphs import CASES, model

NESTED = next(case for case in CASES if case.name == "inside If and Loop")
LIMIT = 1 << 20


def write(folder: Path, content: Any) -> Path:
    """Write a model's file."""
    path = folder / "model.onnx"
    path.write_bytes(content.SerializeToString())
    return path


def outside(where: str, place: str) -> Any:
    """A model with a tensor whose data lies elsewhere: as an initializer, in a node, in a branch, in a function."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=where)
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    nodes, initializers, functions = [add], [], []
    if place == "initializer":
        initializers = [tensor]
    elif place == "node":
        nodes = [constant, add]
    elif place == "branch":
        branch = helper.make_graph([add], "branch", [], [y], [tensor])
        yes = numpy_helper.from_array(np.array(True), "yes")
        nodes, initializers = [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)], [yes]
    else:
        if place == "default of a function":
            constant = helper.make_node("Constant", [], ["w"])
            constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="shift")
        functions = [helper.make_function("own", "Shift", ["x"], ["y"], [constant, add], opsets[:1])]
        if place == "default of a function":
            functions[0].attribute_proto.append(helper.make_attribute("shift", tensor))
        nodes = [helper.make_node("Shift", ["x"], ["y"], domain="own")]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def test_every_node_and_where_it_stands(tmp_path: Path) -> None:
    """In the branches of an If, in the body of a Loop, and in functions of the file's own."""
    path = write(tmp_path, model(NESTED.graph, NESTED.weights))
    paths = {node.path: node.proto.op_type for node in OnnxFile(path).nodes()}
    assert paths["If[2]/then_branch/GRU[0]"] == "GRU"
    assert paths["If[2]/else_branch/Sub[1]"] == "Sub"
    assert paths["Loop[4]/body/Add[1]"] == "Add"
    path = write(tmp_path, outside("w.bin", "function"))
    assert [node.path for node in OnnxFile(path).nodes()] == ["Shift[0]", "own.Shift/Constant[0]", "own.Shift/Add[1]"]


def test_signature_and_values(tmp_path: Path) -> None:
    """Inputs without those that the file gives itself; dtypes as numpy calls them; free sizes as None."""
    content = model("g (float16[N, 3] x, float[3] w, int64[] k) => (float[] y) { y = Cast<to = 1>(x) }")
    content.graph.initializer.append(numpy_helper.from_array(np.arange(3, dtype=np.float32), "w"))
    file = OnnxFile(write(tmp_path, content))
    assert file.signature.inputs["x"] == Port("float16", (None, 3))
    assert list(file.signature.inputs) == ["x", "k"]
    value = file.initializer("w")
    assert value is not None
    np.testing.assert_array_equal(value, [0, 1, 2])
    assert file.initializer("v") is None
    file.check(LIMIT)


@pytest.mark.parametrize("content", [b"hello, world", b"\x08"])
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    """Told so."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"model\.onnx is not an onnx file"):
        OnnxFile(path)


PLACES = ["initializer", "node", "branch", "function", "default of a function"]


@pytest.mark.parametrize("place", PLACES)
def test_external_data_beside_the_file(tmp_path: Path, place: str) -> None:
    """Wherever its tensor stands it is found, named, and counted."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/w.bin").write_bytes(bytes(8))
    path = write(tmp_path, outside("sub/w.bin", place))
    assert may_have_external_data(path)
    file = OnnxFile(path)
    assert file.external_files() == [(tmp_path / "sub/w.bin").resolve()]
    file.check(LIMIT)
    size = path.stat().st_size + 8
    file.check(size)
    with pytest.raises(LoadError, match=rf"the model has {size} bytes; this server loads up to {size - 1} \(--max-mod"):
        file.check(size - 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("{outside}", "is outside the model's folder"),
        ("../w.bin", "is outside the model's folder"),
        ("sub/../../w.bin", "is outside the model's folder"),
        ("", "is outside the model's folder"),
        ("link.bin", "is a link out of the model's folder"),
        ("away/w.bin", "is a link out of the model's folder"),
        ("nothing.bin", "is missing"),
        ("sub", "is no file"),
    ],
)
def test_external_data_elsewhere(tmp_path: Path, place: str, location: str, says: str) -> None:
    """Absolute, upward, through a link to a file or a folder, missing: refused, naming tensor and place."""
    folder = tmp_path / "1"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    os.symlink(tmp_path / "w.bin", folder / "link.bin")
    os.symlink(tmp_path, folder / "away")
    path = write(folder, outside(location.format(outside=tmp_path / "w.bin"), place))
    assert may_have_external_data(path)
    with pytest.raises(LoadError, match=rf"external data of tensor 'w', .* {says}"):
        OnnxFile(path).check(LIMIT)


@pytest.mark.parametrize("place", ["top", "branch", "function"])
def test_unknown_domains(tmp_path: Path, place: str) -> None:
    """A node that nobody brings along, wherever it stands: refused, naming its domain and itself."""
    content = outside("w.bin", "function" if place == "function" else "branch")
    content.opset_import.append(helper.make_opsetid("acme", 1))
    strange = helper.make_node("Magic", ["x"], ["z"], domain="acme", name="spell")
    if place == "function":
        content.functions[0].node.append(strange)
    elif place == "branch":
        content.graph.node[0].attribute[0].g.node.append(strange)
    else:
        content.graph.node.append(strange)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    with pytest.raises(LoadError, match=r"node '.*spell' is a Magic of domain 'acme', which onnxruntime does not"):
        OnnxFile(write(tmp_path, content)).check(LIMIT)


def test_known_domains(tmp_path: Path) -> None:
    """ONNX's own, Microsoft's, and the functions that the file brings itself; not others of their domain."""
    content = outside("w.bin", "function")
    (tmp_path / "w.bin").write_bytes(bytes(8))
    content.graph.node.append(helper.make_node("FusedGemm", ["x"], ["z"], domain="com.microsoft"))
    content.graph.node.append(helper.make_node("Scaler", ["x"], ["u"], domain="ai.onnx.ml"))
    OnnxFile(write(tmp_path, content)).check(LIMIT)
    content.graph.node.append(helper.make_node("Other", ["x"], ["v"], domain="own"))
    with pytest.raises(LoadError, match=r"node 'Other\[3\]' is a Other of domain 'own'"):
        OnnxFile(write(tmp_path, content)).check(LIMIT)


def test_a_file_without_external_data_is_told_without_parsing(tmp_path: Path) -> None:
    """The common case, and an empty file; a file that is not there is named."""
    path = write(tmp_path, model(NESTED.graph, NESTED.weights))
    assert not may_have_external_data(path)
    assert OnnxFile(path).external() == []
    path.write_bytes(b"")
    assert not may_have_external_data(path)
    path.unlink()
    for read in (may_have_external_data, OnnxFile, lambda path: check_size([path], LIMIT)):
        with pytest.raises(LoadError, match=r"cannot read model\.onnx: No such file"):
            read(path)


def test_onnx_reads_what_is_tested_here() -> None:
    """The models above are models, so that a refusal is for the reason that is said."""
    onnx.checker.check_model(model(NESTED.graph, NESTED.weights))


def test_a_seal(tmp_path: Path) -> None:
    """Is an entry of the metadata to whoever reads the file; a bit that is turned anywhere before it is found."""
    path = write(tmp_path, model(NESTED.graph, NESTED.weights))
    check_seal(path)
    content = seal(path.read_bytes())
    path.write_bytes(content)
    check_seal(path)
    sealed = OnnxFile(path)
    assert list(sealed.metadata) == [SEAL_KEY]
    assert sealed.model.SerializeToString() == content
    for place in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(LoadError, match=r"^model\.onnx is not what was written: .* was damaged or changed"):
            check_seal(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(1000)], ids=["empty", "short", "zeros"])
def test_files_without_a_seal(tmp_path: Path, content: bytes) -> None:
    """Are not judged by one, whatever they are."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    check_seal(path)


def test_a_seal_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Is a LoadError, as of any other reader."""
    with pytest.raises(LoadError, match=r"cannot read model\.onnx: No such file"):
        check_seal(tmp_path / "model.onnx")
