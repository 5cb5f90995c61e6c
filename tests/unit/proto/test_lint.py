"""The wire contracts keep the rules for names and comments that buf calls STANDARD and COMMENTS.

Owns the rules as functions over protoc's descriptors, so that no further tool is needed. Each rule is held against the
contracts, which must keep it, and against a small file that breaks it. Source: buf's documentation, "Lint rules".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

Element = DescriptorProto | EnumDescriptorProto | FieldDescriptorProto | ServiceDescriptorProto | MethodDescriptorProto

PROTO = Path(__file__).resolve().parents[3] / "proto"
CONTRACTS = ("conveyor/v1/conveyor.proto", "inference/inference.proto")

PASCAL_CASE = re.compile(r"([A-Z][a-z0-9]*)+")
LOWER_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE_CASE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
VERSIONED_PACKAGE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\.v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?")

# Field numbers in descriptor.proto: an element's path in the source is the way to it through these lists.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE, ENUM_VALUE, SERVICE_METHOD = 4, 5, 6, 2, 2
MESSAGE_FIELD, MESSAGE_MESSAGE, MESSAGE_ENUM = 2, 3, 4


def described(folder: Path, name: str, descriptor: Path) -> FileDescriptorProto:
    """Compiles one .proto, comments included."""
    arguments = [f"--proto_path={folder}", f"--proto_path={files('grpc_tools') / '_proto'}"]
    arguments += [f"--descriptor_set_out={descriptor}", "--include_source_info", name]
    assert protoc.main(["protoc", *arguments]) == 0
    return FileDescriptorSet.FromString(descriptor.read_bytes()).file[0]


def elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Everything that must have a comment: its path in the source and its name."""
    for i, message in enumerate(file.message_type):
        yield from elements_of_message((FILE_MESSAGE, i), message)
    for i, enum in enumerate(file.enum_type):
        yield from elements_of_enum((FILE_ENUM, i), enum)
    for i, service in enumerate(file.service):
        yield (FILE_SERVICE, i), service.name
        for j, method in enumerate(service.method):
            yield (FILE_SERVICE, i, SERVICE_METHOD, j), f"{service.name}.{method.name}"


def elements_of_message(path: tuple[int, ...], message: DescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The same for a message, but for the messages that protoc makes of maps."""
    yield path, message.name
    for j, field in enumerate(message.field):
        yield (*path, MESSAGE_FIELD, j), f"{message.name}.{field.name}"
    for j, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from elements_of_message((*path, MESSAGE_MESSAGE, j), nested)
    for j, enum in enumerate(message.enum_type):
        yield from elements_of_enum((*path, MESSAGE_ENUM, j), enum)


def elements_of_enum(path: tuple[int, ...], enum: EnumDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The same for an enum."""
    yield path, enum.name
    for j, value in enumerate(enum.value):
        yield (*path, ENUM_VALUE, j), value.name


def everything_has_a_comment(file: FileDescriptorProto) -> Iterator[str]:
    """COMMENTS: a leading comment on every service, method, message, field, enum and enum value."""
    comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
    for path, name in elements(file):
        if not comments.get(path):
            yield f"{name} has no comment"


def package_matches_folder(file: FileDescriptorProto) -> Iterator[str]:
    """PACKAGE_DIRECTORY_MATCH and FILE_LOWER_SNAKE_CASE."""
    folder, _, name = file.name.rpartition("/")
    if folder != file.package.replace(".", "/"):
        yield f"package {file.package} does not match the folder {folder}"
    if not LOWER_SNAKE_CASE.fullmatch(name.removesuffix(".proto")):
        yield f"{name} is not lower_snake_case.proto"


def package_has_a_version(file: FileDescriptorProto) -> Iterator[str]:
    """PACKAGE_VERSION_SUFFIX and PACKAGE_LOWER_SNAKE_CASE."""
    if not VERSIONED_PACKAGE.fullmatch(file.package):
        yield f"package {file.package!r} is not lower_snake_case with a version as its last part"


def types_are_pascal_case(file: FileDescriptorProto) -> Iterator[str]:
    """MESSAGE_, ENUM_, SERVICE_ and RPC_PASCAL_CASE."""
    names = [message.name for message in file.message_type] + [enum.name for enum in file.enum_type]
    for service in file.service:
        names += [service.name, *(method.name for method in service.method)]
    yield from (f"{name} is not PascalCase" for name in names if not PASCAL_CASE.fullmatch(name))


def fields_are_lower_snake_case(file: FileDescriptorProto) -> Iterator[str]:
    """FIELD_LOWER_SNAKE_CASE and ONEOF_LOWER_SNAKE_CASE (but for the oneofs that protoc makes of optional fields)."""
    for message in file.message_type:
        made = {field.oneof_index for field in message.field if field.proto3_optional}
        names = [field.name for field in message.field]
        names += [oneof.name for i, oneof in enumerate(message.oneof_decl) if i not in made]
        yield from (f"{message.name}.{n} is not lower_snake_case" for n in names if not LOWER_SNAKE_CASE.fullmatch(n))


def enum_values_are_prefixed(file: FileDescriptorProto) -> Iterator[str]:
    """ENUM_VALUE_PREFIX, ENUM_VALUE_UPPER_SNAKE_CASE, ENUM_ZERO_VALUE_SUFFIX, ENUM_NO_ALLOW_ALIAS."""
    for enum in file.enum_type:
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
        for value in enum.value:
            if not UPPER_SNAKE_CASE.fullmatch(value.name) or not value.name.startswith(prefix):
                yield f"{value.name} is not UPPER_SNAKE_CASE after {prefix}"
            if value.number == 0 and value.name != f"{prefix}UNSPECIFIED":
                yield f"{value.name} is zero but not {prefix}UNSPECIFIED"
        if enum.options.allow_alias:
            yield f"{enum.name} allows aliases"


def services_are_called_service(file: FileDescriptorProto) -> Iterator[str]:
    """SERVICE_SUFFIX."""
    yield from (f"{s.name} does not end in Service" for s in file.service if not s.name.endswith("Service"))


def methods_have_messages_of_their_own(file: FileDescriptorProto) -> Iterator[str]:
    """RPC_REQUEST_STANDARD_NAME, RPC_RESPONSE_STANDARD_NAME, RPC_REQUEST_RESPONSE_UNIQUE."""
    used: set[str] = set()
    for service in file.service:
        for method in service.method:
            for kind, message in (("Request", method.input_type), ("Response", method.output_type)):
                name = message.rpartition(".")[2]
                if name not in (f"{method.name}{kind}", f"{service.name}{method.name}{kind}"):
                    yield f"{method.name} takes or gives {name}, not {method.name}{kind}"
                if message in used:
                    yield f"{name} is used twice"
                used.add(message)


def nothing_is_nested_or_imported_in_public(file: FileDescriptorProto) -> Iterator[str]:
    """IMPORT_NO_PUBLIC and IMPORT_NO_WEAK; nested types are refused so that the other rules see every element."""
    if file.public_dependency or file.weak_dependency:
        yield "public and weak imports are not allowed"
    for message in file.message_type:
        if message.nested_type or message.enum_type:
            yield f"{message.name} holds nested types"


BREAKS: dict[Callable[[FileDescriptorProto], Iterator[str]], str] = {
    everything_has_a_comment: "message Bare {}",
    package_matches_folder: "",
    package_has_a_version: "",
    types_are_pascal_case: "message lower_case {}",
    fields_are_lower_snake_case: "message Pair { int32 firstHalf = 1; }",
    enum_values_are_prefixed: "enum Colour { RED = 0; }",
    services_are_called_service: "service Painter {}",
    methods_have_messages_of_their_own: "message Empty {} service Painter { rpc Paint(Empty) returns (Empty); }",
    nothing_is_nested_or_imported_in_public: "message Outer { message Inner {} }",
}
"""Every rule, and a file that breaks it. The file lies in the wrong folder, in a package without a version."""


PUBLISHED = {
    package_has_a_version,
    enum_values_are_prefixed,
    methods_have_messages_of_their_own,
    nothing_is_nested_or_imported_in_public,
}
"""Rules that the names of the Open Inference Protocol break, which are published and cannot be others."""


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """The committed contracts."""
    folder = tmp_path_factory.mktemp("descriptors")
    return {name: described(PROTO, name, folder / "contract.pb") for name in CONTRACTS}


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_the_contract_keeps_the_rule(
    contracts: dict[str, FileDescriptorProto], name: str, rule: Callable[..., Iterator[str]]
) -> None:
    """Nothing in a contract breaks the rule, unless what is published does: then the exception is needed."""
    excepted = name == "inference/inference.proto" and rule in PUBLISHED
    assert bool(list(rule(contracts[name]))) == excepted


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_the_rule_sees_what_breaks_it(tmp_path: Path, rule: Callable[..., Iterator[str]]) -> None:
    """A file made to break the rule is complained of: the rule can fail."""
    (tmp_path / "bad.proto").write_text(f'syntax = "proto3"; package bad; {BREAKS[rule]}')
    assert list(rule(described(tmp_path, "bad.proto", tmp_path / "bad.pb"))) != []


SOME = {
    "conveyor/v1/conveyor.proto": {
        "ConveyorService",
        "ConveyorService.Stream",
        "Chunk.position",
        "DATA_TYPE_FLOAT32",
    },
    "inference/inference.proto": {
        "GRPCInferenceService.ModelInfer",
        "InferInputTensor.datatype",
        "State.dims",
        "TYPE_FP32",
        "KIND_GPU",
    },
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contract_is_seen_whole(contracts: dict[str, FileDescriptorProto], name: str) -> None:
    """The rules look at the service, its methods and the messages; an empty descriptor would keep every rule."""
    assert SOME[name] <= {element for _, element in elements(contracts[name])}
