"""What the ingress does around a request: who may call what, errors in OpenAI's shape, bodies."""

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable

import pytest
from fastapi import Request, Response
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from chameleon_ray import metrics
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import ApiConfig, AppConfig, ConfigError
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.placement import PlacementUnavailableError
from deployments.http import Guard, answered, json_object, read_body
from deployments.live_page import LivePage
from deployments.relay import check_adapter_fields

LOCAL = "127.0.0.1:8000"
LOAD = "/v1/load_lora_adapter"


def request(
    body: bytes = b"", *, client: str | None = "127.0.0.1", parts: int = 1, path: str = LOAD, **headers: str
) -> Request:
    """A request as the HTTP server hands it over; ``content_type`` becomes Content-Type and so on."""
    size = max(1, -(-len(body) // parts))
    pending = [body[start : start + size] for start in range(0, len(body), size)] or [b""]

    async def receive() -> dict[str, object]:
        part = pending.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(pending)}

    given = {"host": LOCAL, "content_type": "application/json"} | headers
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
        "client": None if client is None else (client, 50000),
    }
    return Request(scope, receive)


def guard(http_host: str | None = "127.0.0.1", **settings: object) -> Guard:
    return Guard(ApiConfig.model_validate(settings), http_host)


def refused(check: Callable[[Request], None], given: Request) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        check(given)
    return caught.value.status, caught.value.kind


def test_without_api_keys_everybody_may_use_the_models() -> None:
    guard().check_client(request(client="10.1.2.3"))


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic one", "one", "Bearer one "])
def test_with_api_keys_others_are_refused(header: str) -> None:
    checked = guard(api_keys=["one", "two"])
    assert refused(checked.check_client, request(authorization=header)) == (401, "authentication_error")


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "BEARER one"])
def test_with_api_keys_each_of_them_opens(header: str) -> None:
    guard(api_keys=["one", "two"]).check_client(request(authorization=header))


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CLIENT_KEY", "from-env")
    monkeypatch.setenv("TEST_ADMIN_KEY", "admin-from-env")
    checked = guard(api_keys=["env:TEST_CLIENT_KEY"], admin_key="env:TEST_ADMIN_KEY")
    checked.check_client(request(authorization="Bearer from-env"))
    assert refused(checked.check_client, request(authorization="Bearer env:TEST_CLIENT_KEY"))[0] == 401
    checked.check_admin(request(authorization="Bearer admin-from-env"))
    assert refused(checked.check_admin, request(authorization="Bearer from-env"))[0] == 401


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_the_environment_lacks_is_an_error_not_an_open_door(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TEST_ADMIN_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_ADMIN_KEY", value)
    with pytest.raises(ConfigError, match="TEST_ADMIN_KEY"):
        guard(admin_key="env:TEST_ADMIN_KEY")


def test_adapter_management_is_closed_by_default() -> None:
    assert refused(guard().check_admin, request()) == (403, "permission_error")


def basic(password: str) -> str:
    return f"Basic {base64.b64encode(f'any:{password}'.encode()).decode()}"


def test_the_live_page_is_closed_like_adapter_loading() -> None:
    assert refused(guard().check_page, request()) == (403, "permission_error")
    checked = guard(admin_open_on_loopback=True)
    checked.check_page(request(content_type="text/html"))
    assert refused(checked.check_page, request(client="10.1.2.3")) == (403, "permission_error")
    assert refused(checked.check_page, request(host="attacker.example")) == (403, "permission_error")


@pytest.mark.parametrize("header", ["Bearer secret", basic("secret")])
def test_the_admin_key_opens_the_live_page_also_as_a_browser_sends_it(header: str) -> None:
    checked = guard("0.0.0.0", admin_key="secret")
    checked.check_page(request(client="10.1.2.3", host="example.org", authorization=header))


@pytest.mark.parametrize("header", ["", "Basic", "Basic secret", "Basic ====", basic(""), basic("other"), "Bearer x"])
def test_no_other_key_opens_the_live_page(header: str) -> None:
    checked = guard(admin_key="secret", admin_open_on_loopback=True)
    assert refused(checked.check_page, request(authorization=header)) == (401, "authentication_error")


def test_the_live_page_runs_its_own_script_only_and_reaches_its_own_server_only() -> None:
    page = LivePage()
    answer = page.response()
    policy = dict(one.split(" ", 1) for one in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and policy["style-src"].startswith("'sha256-")
    urls = re.findall(rb"(?:https?:)?//[\w.]+", bytes(answer.body))
    assert set(urls) == {b"http://www.w3.org"}, "the name of SVG's namespace, which nobody fetches"
    assert "www-authenticate" not in page.asking_for_key(answer).headers
    asking = page.asking_for_key(Response(status_code=401))
    assert asking.headers["www-authenticate"].startswith("Basic realm=")


def test_the_admin_key_opens_from_anywhere_and_nothing_else_does() -> None:
    checked = guard("0.0.0.0", admin_key="secret", admin_open_on_loopback=True)
    checked.check_admin(request(client="10.1.2.3", host="example.org", authorization="Bearer secret"))
    assert refused(checked.check_admin, request(authorization="Bearer other")) == (401, "authentication_error")
    assert refused(checked.check_admin, request()) == (401, "authentication_error"), "loopback alone is not enough"


@pytest.mark.parametrize("host", [LOCAL, "localhost:8000", "localhost", "[::1]:8000", "127.8.9.10"])
def test_open_on_loopback_by_a_loopback_name(host: str) -> None:
    guard(admin_open_on_loopback=True).check_admin(request(host=host))


@pytest.mark.parametrize(
    ("http_host", "given"),
    [
        ("0.0.0.0", request()),
        ("10.0.0.1", request()),
        (None, request()),
        ("127.0.0.1", request(client="10.1.2.3")),
        ("127.0.0.1", request(client=None)),
        ("127.0.0.1", request(host="attacker.example")),
        ("127.0.0.1", request(host="localhost.attacker.example")),
        ("127.0.0.1", request(host="127.0.0.1.attacker.example:8000")),
        ("127.0.0.1", request(host="")),
        ("127.0.0.1", request(x_forwarded_for="10.1.2.3")),
        ("127.0.0.1", request(x_real_ip="10.1.2.3")),
        ("127.0.0.1", request(forwarded="for=10.1.2.3")),
    ],
)
def test_open_on_loopback_is_closed_to_all_others(http_host: str | None, given: Request) -> None:
    checked = guard(http_host, admin_open_on_loopback=True)
    assert refused(checked.check_admin, given) == (403, "permission_error")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_form_of_a_web_page_cannot_manage_adapters(content_type: str) -> None:
    for checked, key in ((guard(admin_open_on_loopback=True), ""), (guard(admin_key="secret"), "Bearer secret")):
        assert refused(checked.check_admin, request(content_type=content_type, authorization=key))[0] == 415
    guard(admin_open_on_loopback=True).check_admin(request(content_type="Application/JSON; charset=utf-8"))


def answer_to(handler: Callable[[Request], Awaitable[Response]], retry_after_s: float = 3) -> Response:
    return asyncio.run(answered(request(), retry_after_s, handler))


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (BackPressureError(num_queued_requests=7, max_queued_requests=5), 503, "overloaded", "3"),
        (DeploymentUnavailableError(None), 503, "overloaded", "3"),
        (PlacementUnavailableError("no connection"), 503, "catalog_unavailable", "2"),
        (ApiError(502, "died", "replica_died", retry_after_s=0.4), 502, "replica_died", "1"),
        (ApiError(503, "any moment", "adapter_load_failed", retry_after_s=0.0), 503, "adapter_load_failed", "1"),
        (ApiError(404, "not here", "NotFoundError", param="model"), 404, "NotFoundError", None),
        (RuntimeError("with a secret inside"), 500, "server_error", None),
    ],
)
def test_errors_have_the_shape_of_openai(error: Exception, status: int, kind: str, retry_after: str | None) -> None:
    async def handler(_: Request) -> Response:
        raise error

    response = answer_to(handler)
    assert response.status_code == status
    assert response.media_type == "application/json"
    assert response.headers.get("Retry-After") == retry_after
    content = json.loads(bytes(response.body))
    assert content.keys() == {"error"}
    assert (content["error"]["code"], content["error"]["type"]) == (status, kind)
    assert "secret" not in content["error"]["message"]


def test_requests_are_counted_by_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    counter = metrics.REQUESTS.counter()
    monkeypatch.setattr(counter, "inc", lambda tags: counted.append(tags["outcome"]))

    async def fails(error: BaseException) -> Response:
        raise error

    async def succeeds(_: Request) -> Response:
        return Response("fine")

    answer_to(succeeds)
    for error in (ApiError(404, "no", "x"), BackPressureError(1, 1), ValueError()):
        answer_to(lambda _, error=error: fails(error))
    with pytest.raises(asyncio.CancelledError):
        answer_to(lambda _: fails(asyncio.CancelledError()))
    assert counted == ["ok", "client_error", "overloaded", "server_error", "cancelled"]
    for path in ("/chameleon/", "/v1/chameleon/queues"):
        asyncio.run(answered(request(path=path), 5.0, succeeds))
    assert len(counted) == 5, "who watches the application is not its load"


def test_body_limit() -> None:
    config = AppConfig.from_args({"model.source": "x", "ingress.max_body_mib": "1"})
    whole = b"a" * 2**20
    assert asyncio.run(read_body(request(whole, parts=5), config)) == whole
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body(request(whole + b"a", parts=5), config))
    assert caught.value.status == 413


def test_json_object() -> None:
    assert json_object(b'{"a": "x"}', needed=("a",)) == {"a": "x"}
    for body in (b"", b"[]", b'"a"', b"{", b"\xff", b"[" * 10**6):
        with pytest.raises(ApiError) as caught:
            json_object(body)
        assert caught.value.status == 400
    for body in (b"{}", b'{"a": ""}', b'{"a": 5}', b'{"a": null}'):
        with pytest.raises(ApiError) as caught:
            json_object(body, needed=("a",))
        assert (caught.value.status, caught.value.param) == (400, "a")


SQL = AdapterRecord(name="sql", digest="d", uri="/sql", rank=8, size_bytes=1)


@pytest.mark.parametrize("field", ["lora_path", "lora_name", "lora_request", "adapter_id"])
def test_fields_of_other_servers_never_choose_an_adapter_silently(field: str) -> None:
    for record, value in ((None, "sql"), (None, "base"), (None, ""), (None, {"lora_name": "sql"}), (SQL, "chat")):
        with pytest.raises(ApiError, match="'model'") as caught:
            check_adapter_fields({"model": "x", field: value}, record)
        assert (caught.value.status, caught.value.param) == (400, field)
    for record, value in ((None, None), (SQL, None), (SQL, "sql")):
        check_adapter_fields({"model": "x", field: value}, record)
    check_adapter_fields({"model": "x"}, None)
