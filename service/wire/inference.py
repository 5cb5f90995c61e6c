"""The second door: inference.GRPCInferenceService, what clients of Triton and KServe speak.

Owns the calls. What a request means is in inference_request.py and inference_call.py; what is told of models in
inference_models.py. Must not know scheduling. Source: the KServe "Open Inference Protocol" and Triton's extensions for
sequences, statistics, model configuration and the model repository.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Coroutine
from typing import Any

import grpc

from conveyor import __version__
from service.errors import InvalidRequest, ModelUnknown, Unsupported
from service.operations import Operations
from service.sequences import Sequences
from service.settings import Settings
from service.ticks.runner import Runner
from service.wire.assembly import Written
from service.wire.door import Context, Door, Places, caller, owner, told, told_always
from service.wire.inference_call import Inference, unknown
from service.wire.inference_models import config, metadata, statistics
from service.wire.inference_request import version_number
from service.wire.inference_stream import InferenceStream
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_stubs import inference_pb2_grpc as stubs
from service.wire.malformed import Malformed

EXTENSIONS = ("sequence", "model_repository", "model_configuration", "schedule_policy", "parameters", "statistics")
"""Those of Triton's extensions that are offered, by the names that it gives them."""

_NO_SHARED_MEMORY = "this server shares no memory with its clients; send tensors in the request"


def _refused(sentence: str) -> Callable[[InferenceServicer, Any, Context], Coroutine[Any, Any, Any]]:
    """A call that is not offered."""

    @told
    async def call(self: InferenceServicer, request: Any, context: Context) -> Any:
        raise Unsupported(sentence)

    return call


class InferenceServicer(Door, stubs.GRPCInferenceServiceServicer):
    """The calls of the Open Inference Protocol.

    Args:
        operations: what is asked.
        sequences: those of the server.
        settings: all of them.
        places: for calls.
        clock: tells the time, in seconds.
    """

    NAME = str(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name)
    ONE_STEP = True

    def __init__(
        self,
        operations: Operations,
        sequences: Sequences,
        settings: Settings,
        places: Places,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(operations, settings, places, clock)
        self._sequences = sequences

    def register(self, server: grpc.aio.Server) -> None:
        """Enter the calls into a server."""
        stubs.add_GRPCInferenceServiceServicer_to_server(self, server)

    # --- health ---

    @told_always
    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Say that the server answers."""
        return pb.ServerLiveResponse(live=True)

    @told_always
    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Say whether new work is taken."""
        return pb.ServerReadyResponse(ready=self._ready)

    @told_always
    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Say whether new work for a model is taken."""
        version = version_number(request.version)
        return pb.ModelReadyResponse(ready=self._ready and self.operations.repository.ready(request.name, version))

    @property
    def _ready(self) -> bool:
        return self.operations.intake.ready and not self.operations.intake.draining

    # --- what is served ---

    @told
    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name the server."""
        return pb.ServerMetadataResponse(name="conveyor", version=__version__, extensions=EXTENSIONS)

    @told
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Describe a model's inputs and outputs."""
        runner = self._find(request.name, request.version)
        return metadata(runner, self.operations.repository.versions(runner.name))

    @told
    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Describe how a model is served."""
        runner = self._find(request.name, request.version)
        versions = self.operations.repository.versions(runner.name)
        return pb.ModelConfigResponse(config=config(runner, versions, self.settings))

    @told
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Tell what was counted, of one version, of all of a model, or of all models."""
        repository = self.operations.repository
        if request.version or request.name:
            # For its error, where there is no such model.
            runners = [self._find(request.name, request.version)]
        if not request.version:
            names = [request.name] if request.name else repository.names()
            runners = [repository.find(name, version) for name in names for version in repository.versions(name)]
        return pb.ModelStatisticsResponse(model_stats=map(statistics, runners))

    # --- inference ---

    @told
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> Written:
        """Run a batch, or step sequences."""
        result: asyncio.Future[Written] = asyncio.get_running_loop().create_future()

        def done(response: Written | Exception) -> None:
            if result.done():  # the caller has gone in this very moment
                return
            if isinstance(response, Exception):
                result.set_exception(response)
            else:
                result.set_result(response)

        inference = Inference(self, self._sequences, owner(context), caller(context), request, done)
        inference.begin(request, context.time_remaining())
        try:
            return await result
        except asyncio.CancelledError:
            inference.abandon()
            raise

    async def ModelStreamInfer(
        self, requests: AsyncIterable[pb.ModelInferRequest | Malformed], context: Context
    ) -> None:
        """Run batches and step sequences, any number of them."""
        stream = InferenceStream(self, self._sequences, owner(context), caller(context), context.time_remaining)
        async with self.streaming(stream, context):
            await stream.run(requests, context)

    # --- the repository ---

    @told
    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """List every version that is known."""
        _check_repository(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name, version=str(entry.version or ""), state=entry.state, reason=entry.reason
                )
                for entry in self.operations.repository.index()
                if entry.state == "READY" or not request.ready
            ]
        )

    @told
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model as it stands in the repository."""
        _check_repository(request.repository_name)
        if request.parameters:
            raise Unsupported(
                "models are loaded as they stand in the repository, not with a configuration or files from a request"
            )
        await self.operations.repository.load_model(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @told
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take no new work for a model; what goes on goes on."""
        _check_repository(request.repository_name)
        await self.operations.repository.unload_model(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    # --- what is not offered ---

    SystemSharedMemoryStatus = _refused(_NO_SHARED_MEMORY)
    SystemSharedMemoryRegister = _refused(_NO_SHARED_MEMORY)
    SystemSharedMemoryUnregister = _refused(_NO_SHARED_MEMORY)
    CudaSharedMemoryStatus = _refused(_NO_SHARED_MEMORY)
    CudaSharedMemoryRegister = _refused(_NO_SHARED_MEMORY)
    CudaSharedMemoryUnregister = _refused(_NO_SHARED_MEMORY)
    TraceSetting = _refused("this server writes no traces")
    LogSettings = _refused("this server's log is set by its flags --log-level and --log-format, when it starts")

    def _find(self, model: str, version: str) -> Runner:
        try:
            return self.operations.repository.find(model, version_number(version))
        except ModelUnknown as error:
            raise unknown(model, error) from None


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"there is no repository {name[:64]!r}; there is one, and its name is left out")
