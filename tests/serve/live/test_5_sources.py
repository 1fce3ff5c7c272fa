"""Adapters from a bucket: loaded, and fetched by the request that names them first."""

from functools import partial
from pathlib import Path

import redis
from adapter_files import scaled_adapter
from object_store import BUCKET, FILES

from chameleon_ray.adapters.store import content_digest
from live.calls import complete, concurrently, error_of, text_of
from live.service import Service, wait_for


def test_load_from_a_bucket(service: Service, tmp_path: Path) -> None:
    assert service.s3 is not None
    folder = scaled_adapter(service.demo.adapters / "demo-r8-00", tmp_path / "a", 0.9)
    uri = service.s3.put(folder, BUCKET, "loads/a")
    assert error_of(service.load("from-s3", f"s3://{BUCKET}/other/a"), 403)["type"] == "adapter_path_not_allowed"
    assert error_of(service.load("from-s3", uri, credentials="absent"), 403)["type"] == "adapter_path_not_allowed"
    assert error_of(service.load("from-s3", f"s3://{BUCKET}/loads/b"), 404)["type"] == "adapter_not_found"
    assert service.load("from-s3", uri, credentials="tenant").status_code == 200
    text_of(complete(service, "from-s3"))
    assert service.http.get("/v1/models/from-s3").json()["root"] == uri
    assert service.unload("from-s3").status_code == 200


def test_a_name_is_fetched_by_its_first_request_and_follows_the_bucket(service: Service, tmp_path: Path) -> None:
    assert service.s3 is not None
    assert error_of(complete(service, "tenant/a"), 404)["type"] == "NotFoundError"
    source = service.demo.adapters / "demo-r32-02"
    service.s3.put(scaled_adapter(source, tmp_path / "a", 0.9), BUCKET, "tenant/a")
    wait_for(lambda: complete(service, "tenant/a").status_code == 200, "the absent name is forgotten")
    assert "tenant/a" in service.adapter_names()
    service.s3.put(scaled_adapter(source, tmp_path / "b", -0.7), BUCKET, "tenant/b")
    texts = [
        text_of(one) for one in concurrently([partial(complete, service, "tenant/b", max_tokens=16)] * 8, clients=8)
    ]
    assert len(set(texts)) == 1
    digest = content_digest(tmp_path / "b")
    with redis.Redis.from_url(service.redis.url) as counts:
        wait_for(
            lambda: (counts.zscore(f"{service.key_prefix}:popularity", digest) or 0) >= 8, "new replicas can know of it"
        )

    service.s3.put(scaled_adapter(source, tmp_path / "c", 0.9), BUCKET, "tenant/b")
    wanted = text_of(complete(service, "tenant/a", max_tokens=16))
    assert wanted != texts[0]
    wait_for(
        lambda: text_of(complete(service, "tenant/b", max_tokens=16)) == wanted, "the changed adapter answers", 60.0
    )
    for name in ("a", "b"):
        for file in FILES:
            service.s3.client.delete_object(Bucket=BUCKET, Key=f"tenant/{name}/{file}")
    wait_for(lambda: complete(service, "tenant/a").status_code == 404, "deleted adapters go", 60.0)
    wait_for(lambda: not {"tenant/a", "tenant/b"} & set(service.adapter_names()), "and from the list", 60.0)
