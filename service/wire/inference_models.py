"""A model as the Open Inference Protocol describes it: metadata, configuration, statistics.

Says what is true of how it is served, and leaves out what does not apply. Must not know calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from service.manifest import Manifest, StateSpec, TensorSpec
from service.settings import Settings
from service.ticks.runner import Runner
from service.ticks.statistics import Spent
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_tensors import DATATYPES

PLATFORM = "onnxruntime_onnx"
_TYPES: dict[str, pb.DataType] = {name: getattr(pb, f"TYPE_{datatype}") for name, datatype in DATATYPES.items()}


def metadata(runner: Runner, versions: Iterable[int]) -> pb.ModelMetadataResponse:
    """Describe a model's inputs and outputs, batch first.

    Args:
        runner: the model.
        versions: of it that are served.
    """
    manifest = runner.manifest

    def tensors(specs: Sequence[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        return [
            pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=DATATYPES[spec.dtype], shape=[-1, *_dims(spec, manifest)]
            )
            for spec in specs
        ]

    return pb.ModelMetadataResponse(
        name=runner.name,
        versions=map(str, versions),
        platform=PLATFORM,
        inputs=tensors(manifest.inputs),
        outputs=tensors(manifest.outputs),
    )


def config(runner: Runner, versions: Iterable[int], settings: Settings) -> pb.ModelConfig:
    """Describe how a model is served.

    Args:
        runner: the model.
        versions: of it that are served.
        settings: of the server.
    """
    manifest = runner.manifest
    described = pb.ModelConfig(
        name=runner.name,
        platform=PLATFORM,
        backend="onnxruntime",
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=versions)),
        max_batch_size=min(settings.max_batch, (1 << 31) - 1),
        input=[
            pb.ModelInput(name=spec.name, data_type=_TYPES[spec.dtype], dims=_dims(spec, manifest))
            for spec in manifest.inputs
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_TYPES[spec.dtype], dims=_dims(spec, manifest))
            for spec in manifest.outputs
        ],
        instance_group=[_device(runner, settings)],
        default_model_filename=runner.choice.file,
        parameters={name: pb.ModelParameter(string_value=value) for name, value in _of_device(runner)},
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )
    if manifest.streamable:
        described.sequence_batching.CopyFrom(
            pb.ModelSequenceBatching(
                max_sequence_idle_microseconds=round(settings.idle_timeout_s * 1e6),
                oldest=pb.ModelSequenceBatching.StrategyOldest(
                    max_candidate_sequences=min(settings.max_sessions, (1 << 31) - 1), preserve_ordering=True
                ),
                state=map(_state, manifest.states),
            )
        )
    return described


def statistics(runner: Runner) -> pb.ModelStatistics:
    """Tell what was counted of a model since it was loaded."""
    counts = runner.statistics.snapshot()
    return pb.ModelStatistics(
        name=runner.name,
        version=str(runner.version),
        last_inference=counts.last_inference_ms,
        inference_count=counts.inference_count,
        execution_count=counts.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.compute_input),
            compute_infer=_duration(counts.compute_infer),
            compute_output=_duration(counts.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(runs.compute_input),
                compute_infer=_duration(runs.compute_infer),
                compute_output=_duration(runs.compute_output),
            )
            for rows, runs in counts.runs.items()
        ],
    )


def _dims(spec: TensorSpec, manifest: Manifest) -> list[int]:
    """The axes after the batch; a model that takes one step a run is shown without time."""
    time = [-1] if spec.time_axis is not None and manifest.steps_per_run is None else []
    return time + [size or -1 for size in spec.tail]


def _device(runner: Runner, settings: Settings) -> pb.ModelInstanceGroup:
    if runner.choice.device == "cpu":
        return pb.ModelInstanceGroup(name=runner.name, count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    gpu = pb.ModelInstanceGroup.KIND_GPU
    return pb.ModelInstanceGroup(name=runner.name, count=1, kind=gpu, gpus=[settings.gpu_id])


def _of_device(runner: Runner) -> Iterator[tuple[str, str]]:
    """What this protocol has no fields for."""
    choice = runner.choice
    yield "device", choice.device
    if choice.fallback:
        yield "fallback", "true"
    if choice.tf32:
        yield "tf32", "true"
    if choice.tf32_difference is not None:
        yield "tf32_difference", f"{choice.tf32_difference:.2g}"


def _state(spec: StateSpec) -> pb.ModelSequenceBatching.State:
    state = pb.ModelSequenceBatching.State(
        input_name=spec.input, output_name=spec.output, data_type=_TYPES[spec.dtype], dims=spec.tail
    )
    if spec.initial is None:
        state.initial_state.add(name="zeros", data_type=_TYPES[spec.dtype], dims=spec.tail, zero_data=True)
    return state


def _duration(spent: Spent) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=spent.count, ns=spent.ns)
