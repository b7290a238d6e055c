"""Traces: a real collector endpoint gets the spans of real requests."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serving.running import install, put_prices, until, web

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collector() -> Iterator[tuple[str, list]]:
    """An OTLP/HTTP endpoint, and the spans that it got."""
    spans: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_requests_are_traced_when_an_endpoint_is_set(tmp_path, monkeypatch):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with collector() as (url, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with web(tmp_path) as server:
            headers = {"traceparent": PARENT, "x-request-id": "asked-once"}
            assert server.client.get("/v1/forecast/GOOG", headers=headers).is_success
            assert server.client.get("/v1/models").is_success

            def named() -> dict:
                return {span.name: span for span in spans}

            until(lambda: {"GET /v1/forecast/{symbol}", "GET /v1/models"} <= set(named()), "spans")
        forecast = named()["GET /v1/forecast/{symbol}"]
        assert forecast.trace_id.hex() == PARENT.split("-")[1]
        told = {each.key: each.value.string_value for each in forecast.attributes}
        assert told["perennial.model_version"] == "1"
        assert told["perennial.request_id"] == "asked-once"
