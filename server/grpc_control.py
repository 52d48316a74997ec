"""The Control service: what this server is, how busy it is, and an end to one request."""

import time
from importlib.metadata import version

from pallasite.proto import control_pb2 as pb
from pallasite.server.config import ServerConfig
from pallasite.server.generate import TextEngine
from pallasite.server.grpc_door import Call


class ControlService:
    """pallasite.v1.Control, over one text engine."""

    def __init__(self, text_engine: TextEngine, config: ServerConfig) -> None:
        self._text_engine = text_engine
        self._config = config
        self._start = time.monotonic()

    async def get_server_info(
        self, request: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        """What this server is."""
        return pb.GetServerInfoResponse(
            version=version("pallasite"),
            epoch=self._text_engine.engine.epoch,
            uptime_s=time.monotonic() - self._start,
            models=[self._text_engine.model_name],
            max_message_bytes=self._config.max_message_bytes,
            max_lease_s=self._text_engine.engine.config.max_lease_s,
        )

    async def get_model_info(
        self, request: pb.GetModelInfoRequest, call: Call
    ) -> pb.GetModelInfoResponse:
        """What the model is, in numbers."""
        self._text_engine.check_model(request.model)
        engine = self._text_engine.engine
        model = engine.model_config
        return pb.GetModelInfoResponse(
            model=self._text_engine.model_name,
            family=model.family,
            vocab_size=model.vocab_size,
            num_layers=model.num_layers,
            model_width=model.model_width,
            ffn_width=model.ffn_width,
            num_query_heads=model.num_query_heads,
            num_kv_heads=model.num_kv_heads,
            head_width=model.head_width,
            max_context_len=engine.max_context_len,
            eos_token_ids=model.eos_token_ids,
            weights=engine.config.weights,
            weight_forms=engine.weight_forms,
            cache=engine.config.cache_form,
            has_chat_template=self._text_engine.encoder.chat_template is not None,
            adapters=engine.adapter_names(),
            max_adapters=engine.config.max_adapters,
            max_adapter_rank=engine.config.adapter_rank,
            speculate=engine.config.speculate or "",
            speculate_tokens=engine.config.num_drafts,
        )

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """The names of the models that are served."""
        return pb.ListModelsResponse(models=[self._text_engine.model_name])

    async def get_load(self, request: pb.GetLoadRequest, call: Call) -> pb.GetLoadResponse:
        """How busy the engine is."""
        load, metrics = self._text_engine.engine.current_load(), self._text_engine.engine.metrics
        return pb.GetLoadResponse(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_pages=load.num_pages,
            num_free_pages=load.num_free_pages,
            num_leased_pages=load.num_leased_pages,
            num_compilations=metrics.compilations,
            num_program_misses=metrics.misses,
            num_drafts=metrics.num_drafts,
            draft_tokens=metrics.draft_tokens,
            accepted_tokens=metrics.accepted_tokens,
        )

    async def abort(self, request: pb.AbortRequest, call: Call) -> pb.AbortResponse:
        """Ends a request of the caller's own."""
        was_in_flight = self._text_engine.abort(request.request_id, call.tenant)
        return pb.AbortResponse(was_in_flight=was_in_flight)
