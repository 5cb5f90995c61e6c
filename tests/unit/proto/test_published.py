"""The Open Inference Protocol is written as published: names, numbers and types of tritonclient's descriptors.

The two cannot share a process, since both register the package ``inference``; so each is described in one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

DESCRIBE = """
import importlib, json, sys
from google.protobuf.descriptor_pb2 import FileDescriptorProto
fields, values, calls = {}, {}, {}
def message(path, one):
    for field in one.field:
        alternative = one.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        fields[f"{path}.{field.name}"] = [field.number, field.type, field.label, field.type_name, alternative]
    for nested in one.nested_type:
        message(f"{path}.{nested.name}", nested)
    for nested in one.enum_type:
        enum(f"{path}.{nested.name}", nested)
def enum(path, one):
    values.update({f"{path}.{value.name}": value.number for value in one.value})
for name in sys.argv[1:]:
    file = FileDescriptorProto()
    importlib.import_module(name).DESCRIPTOR.CopyToProto(file)
    assert file.package == "inference"
    for one in file.message_type:
        message(one.name, one)
    for one in file.enum_type:
        enum(one.name, one)
    for service in file.service:
        for call in service.method:
            calls[f"{service.name}.{call.name}"] = [
                call.input_type, call.output_type, call.client_streaming, call.server_streaming
            ]
json.dump({"fields": fields, "values": values, "calls": calls}, sys.stdout)
"""


def described(*modules: str) -> dict[str, dict[str, Any]]:
    """What the stubs in some modules say, by a process that imports no others."""
    command = [sys.executable, "-c", DESCRIBE, *modules]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts: dict[str, dict[str, Any]] = json.loads(said)
    return parts


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, Any]]:
    """What the server's stubs say."""
    return described("service.wire.inference_stubs.inference_pb2")


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict[str, Any]]:
    """What tritonclient's stubs say."""
    return described("tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2")


@pytest.mark.parametrize("part", ["fields", "values"])
def test_what_is_here_is_published_so(
    ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]], part: str
) -> None:
    """Every field and enum value is there under the same name, with the same number, type, label and oneof."""
    assert len(ours[part]) > 10
    assert {name: theirs[part].get(name) for name in ours[part]} == ours[part]


def test_what_is_left_out_is_configuration(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """Only messages of a model's configuration lack fields that are published."""
    left_out = {name.partition(".")[0] for name in theirs["fields"].keys() - ours["fields"].keys()}
    assert {name for name in left_out if not name.startswith(("Model", "Batch"))} == set()
    assert not left_out & {"ModelInferRequest", "ModelInferResponse", "ModelStatistics", "ModelMetadataResponse"}


def test_every_call_is_there(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """The service has the calls that are published, and no others, with the same messages."""
    assert ours["calls"] == theirs["calls"]


def test_client_and_tritonclient_in_one_process() -> None:
    """What an app installs of ours registers nothing that tritonclient registers too."""
    command = [sys.executable, "-c", "import conveyor, tritonclient.grpc, tritonclient.grpc.aio, conveyor.v1"]
    subprocess.run(command, cwd=ROOT, check=True)
