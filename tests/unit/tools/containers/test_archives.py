"""Archives that a container runtime imports."""

import io
import json
import tarfile

from tools.cluster.containers.archives import (
    Blob,
    Image,
    Layer,
    digest,
    program_image,
    reachable,
    write_archive,
    write_index,
)


def files(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def layer(content):
    return Layer(digest(content), len(content), lambda: io.BytesIO(content))


def written(image, **options):
    target = io.BytesIO()
    new = write_archive("localhost/one:dev", image, target, **options)
    return files(target.getvalue()), new


def test_a_program_becomes_an_image_that_runs_it(tmp_path):
    program = tmp_path / "thing"
    program.write_bytes(b"\x7fELF")
    found, _ = written(program_image(program))
    (entry,) = json.loads(found["index.json"])["manifests"]
    assert entry["annotations"] == {"io.containerd.image.name": "localhost/one:dev"}
    manifest = json.loads(found[f"blobs/{entry['digest'].replace(':', '/')}"])
    config = json.loads(found[f"blobs/{manifest['config']['digest'].replace(':', '/')}"])
    assert config["config"]["Entrypoint"] == ["/thing"]
    assert config["rootfs"]["diff_ids"] == [each["digest"] for each in manifest["layers"]]
    (packed,) = manifest["layers"]
    inside = io.BytesIO(found[f"blobs/{packed['digest'].replace(':', '/')}"])
    with tarfile.open(fileobj=inside) as tar:
        (member,) = tar
        assert (member.name, member.mode) == ("thing", 0o755)
        assert tar.extractfile(member).read() == b"\x7fELF"


def test_every_blob_is_called_by_what_it_holds():
    found, _ = written(Image(b"{}", (layer(b"lower"), layer(b"upper"))))
    blobs = {name: content for name, content in found.items() if name.startswith("blobs/")}
    assert len(blobs) == 4
    assert all(name == f"blobs/{digest(blobs[name]).replace(':', '/')}" for name in blobs)
    (entry,) = json.loads(found["index.json"])["manifests"]
    manifest = json.loads(found[f"blobs/{entry['digest'].replace(':', '/')}"])
    assert [each["size"] for each in manifest["layers"]] == [5, 5]


def test_layers_that_are_there_are_named_but_not_written():
    lower, upper = layer(b"lower"), layer(b"upper")
    found, new = written(Image(b"{}", (lower, upper, upper)), there={lower.digest})
    assert new == [upper]
    assert f"blobs/{lower.digest.replace(':', '/')}" not in found
    (entry,) = json.loads(found["index.json"])["manifests"]
    manifest = json.loads(found[f"blobs/{entry['digest'].replace(':', '/')}"])
    named = [each["digest"] for each in manifest["layers"]]
    assert named == [lower.digest, upper.digest, upper.digest]


def test_an_image_that_is_there_is_only_named():
    target = io.BytesIO()
    write_index("localhost/one:dev", Blob("a/kind", digest(b"root"), 4), target)
    found = files(target.getvalue())
    assert found.keys() == {"index.json", "oci-layout"}
    (entry,) = json.loads(found["index.json"])["manifests"]
    assert entry["annotations"] == {"io.containerd.image.name": "localhost/one:dev"}
    del entry["annotations"]
    assert entry == {"mediaType": "a/kind", "digest": digest(b"root"), "size": 4}


def test_all_that_an_image_consists_of_is_found_and_platforms_that_are_away_are_not(tmp_path):
    def file(name):
        return tmp_path / name.partition(":")[2]

    def stored(kind, content):
        file(digest(content)).write_bytes(content)
        return Blob(f"application/vnd.oci.image.{kind}", digest(content), len(content))

    def named(blob):
        return {"mediaType": blob.kind, "digest": blob.digest, "size": blob.size}

    config, lower = stored("config.v1+json", b"{}"), stored("layer.v1.tar+gzip", b"lower")
    described = {"config": named(config), "layers": [named(lower)]}
    here = stored("manifest.v1+json", json.dumps(described).encode())
    away = Blob(here.kind, digest(b"another platform"), 16)
    index = {"manifests": [named(away), named(here)]}
    root = stored("index.v1+json", json.dumps(index).encode())
    assert set(reachable(root, file)) == {root, here, config, lower}
    assert set(reachable(here, file)) == {here, config, lower}
