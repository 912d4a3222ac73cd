"""Names of span attributes. The GenAI conventions are still in development and have moved once already, so
they are written nowhere else."""

REQUEST_METHOD = "http.request.method"
ROUTE = "http.route"
STATUS_CODE = "http.response.status_code"
SERVER_ADDRESS = "server.address"
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INSTANCE = "tidegate.instance"
REQUEST_ID = "tidegate.request_id"
QUEUE_SECONDS = "tidegate.queue.duration"

_OPERATIONS = {
    b"/v1/chat/completions": "chat",
    b"/v1/responses": "chat",
    b"/v1/responses/{id}": "response",
    b"/v1/messages": "chat",
    b"/v1/completions": "text_completion",
    b"/v1/embeddings": "embeddings",
}


def operation(path: bytes) -> str:
    """`gen_ai.operation.name` of a route."""
    return _OPERATIONS.get(path, path.rsplit(b"/", 1)[-1].decode("ascii", "replace"))
