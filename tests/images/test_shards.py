import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amradio.errors import DatasetError, ImageError
from amradio.images import open_images
from amradio.images.tarfiles import OpenFiles, members

OPTIONS = {"max_pixels": 1000, "background": (0, 0, 0)}


def test_keys_and_labels_across_shards(write_tar, encoded, colour):
    for shard in range(2):
        files = []
        for i in range(3):
            n = 3 * shard + i
            files += [(f"pic{n}.png", encoded(n)), (f"pic{n}.cls", b"%d" % (n % 2))]
        write_tar(f"set/shard-{shard:04d}.tar", files)
    where = write_tar("set/readme/notes.tar", []).parent.parent
    for spec in (where, f"{where}/shard-{{0000..0001}}.tar", f"{where}/*.tar", sorted(where.glob("*.tar"))):
        images = open_images(spec)
        assert [colour(s) for s in images] == list(range(6))
        assert [s.id for s in images] == [f"pic{n}" for n in range(6)]
        assert images.labels.tolist() == [0, 1] * 3
        assert images.class_names is None
    assert images[4].location == f"{where}/shard-0001.tar/pic4.png"
    assert len(open_images(where / "shard-0001.tar")) == 3


def test_labels_of_every_kind(write_tar, encoded):
    def labels(*files):
        images = open_images(write_tar("x.tar", files))
        return (None if images.labels is None else images.labels.tolist()), images.class_names

    png = encoded(1)
    assert labels(("a.png", png), ("a.cls", b"3\n")) == ([3], None)
    assert labels(("a.cls", b"dog"), ("a.png", png), ("b.png", png), ("b.cls", b"cat")) == ([1, 0], ("cat", "dog"))
    assert labels(("a.png", png), ("a.json", json.dumps({"label": 5, "x": "y" * 5000}).encode())) == ([5], None)
    assert labels(("a.png", png), ("a.json", b'{"class": "dog"}')) == ([0], ("dog",))
    assert labels(("a.png", png), ("a.json", b'{"caption": "a dog"}')) == (None, None)
    assert labels(("a.png", png), ("a.json", b"[1]"), ("a.txt", b"7")) == (None, None)
    assert labels(("a.png", png), ("b.png", png), ("b.cls", b"1")) == ([-1, 1], None)
    # The members of a key stand apart, as in an archive of a folder.
    assert labels(("a.png", png), ("b.png", png), ("b.cls", b"1"), ("a.cls", b"0")) == ([0, 1], None)
    assert labels(("b.cls", b"1"), ("a.cls", b"0"), ("a.png", png), ("b.png", png)) == ([0, 1], None)


def test_which_members_are_pictures(write_tar, encoded):
    def ids(*names):
        return [s.id for s in open_images(write_tar("x.tar", [(n, encoded(1)) for n in names]))]

    assert ids("d/a.jpg", "d/a.mask.png", "d/a.txt", "e/a.JPEG", "e/._a.jpg", "e/.a.png") == ["d__a", "e__a"]
    assert ids("d.1/a.jpg") == ["d.1__a"]
    # No key of these has a member with nothing but a picture's ending, so they are an ordinary archive of pictures.
    assert ids("IMG.001.jpg", "IMG.002.jpg") == ["x__IMG.001.jpg", "x__IMG.002.jpg"]
    assert ids("a.jpg", "a.png") == ["x__a.jpg", "x__a.png"]
    with pytest.raises(
        DatasetError, match=r"several pictures under the labelled key a: a\.jpg, a\.png\. .* a\.mask\.png"
    ):
        open_images(write_tar("x.tar", [("a.jpg", b"1"), ("a.png", b"2"), ("a.cls", b"0")]))
    with pytest.raises(DatasetError, match=r"No pictures are in .*x\.tar\."):
        open_images(write_tar("x.tar", [("a.txt", b"1")]))


def test_ids_stay_unique_where_keys_repeat(write_tar, encoded):
    write_tar("s/a-0.tar", [("x.png", encoded(0)), ("y.png", encoded(1))])
    where = write_tar("s/a-1.tar", [("X.png", encoded(2)), ("z.png", encoded(3)), ("z.png", encoded(4))]).parent
    ids = [s.id for s in open_images(where)]
    assert ids[:3] == ["a-0__x.png", "y", "a-1__X.png"]
    assert ids[3].startswith("a-1__z.png-")
    assert len(set(ids)) == 5
    write_tar("t/1/0000.tar", [("x.png", encoded(0))])
    write_tar("t/2/0000.tar", [("x.png", encoded(0))])
    assert [s.id for s in open_images(f"{where.parent}/t/*/*.tar")] == ["1__0000__x.png", "2__0000__x.png"]


def test_class_names_come_from_a_file_beside_the_shards(write_tar, encoded):
    path = write_tar("pets-train/pets-train-0.tar", [("a.png", encoded(0)), ("a.cls", b"1")])
    (path.parent.parent / "pets-classes.json").write_text('["cat", "dog"]')
    assert open_images(path.parent).class_names == ("cat", "dog")
    write_tar("pets-train/pets-train-0.tar", [("a.png", encoded(0)), ("a.cls", b"dog")])
    assert open_images(path.parent).labels.tolist() == [1]
    write_tar("pets-train/pets-train-0.tar", [("a.png", encoded(0)), ("a.cls", b"cow")])
    with pytest.raises(DatasetError, match=r"not in .*pets-classes\.json, such as 'cow'"):
        open_images(path.parent)


def test_splits_are_folders_or_parts_of_file_names(write_tar, encoded, colour):
    png = encoded
    where = write_tar("s/pets-train-0000.tar", [("a.png", png(0))]).parent
    write_tar("s/pets-val-0000.tar", [("a.png", png(1))])
    images = open_images(where, "validation")
    assert ([colour(s) for s in images], images.split) == ([1], "validation")
    with pytest.raises(DatasetError, match=r"s has the splits train, val\. Say which one is meant\."):
        open_images(where)
    with pytest.raises(DatasetError, match=r"s has no split 'test'\. Its splits are train, val\."):
        open_images(where, "test")
    write_tar("d/train/0.tar", [("a.png", png(2))])
    write_tar("d/test/0.tar", [("a.png", png(3))])
    images = open_images(where.parent / "d", "test")
    assert ([colour(s) for s in images], images.split) == ([3], "test")


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_walk_agrees_with_the_standard_library(write_tar, fmt, data):
    limit = 60 if fmt == tarfile.USTAR_FORMAT else 400
    part = st.text("abcé猫-_ ", min_size=1, max_size=limit).map(str.strip).filter(bool)
    names = data.draw(st.lists(st.lists(part, min_size=1, max_size=3).map("/".join), max_size=5))
    files = [
        (n, random.Random(i).randbytes(data.draw(st.sampled_from([0, 1, 511, 512, 513, 3000]))))
        for i, n in enumerate(names)
    ]
    try:
        path = write_tar("walk.tar", files, fmt)
    except ValueError:  # ustar has no room for some names
        return
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    found = list(members(str(path)))
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert [m.small for m in found] == [c if len(c) <= 512 else b"" for _, c in files]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_archives_of_the_tar_command(tree, tmp_path, colour):
    folder = tree(["a/1.png", f"b/{'long' * 40}.png", "Käse.png"])
    for fmt in ("gnu", "pax", "ustar"):
        where = ["--format", fmt, "-C", folder]
        done = subprocess.run(["tar", "-cf", tmp_path / "x.tar", *where, "."], capture_output=True, check=False)
        if done.returncode == 0:  # tar programs of other makers know other formats
            assert sorted(colour(s) for s in open_images(tmp_path / "x.tar")) == [0, 1, 2]


def test_sizes_and_names_in_other_forms(tmp_path, encoded, colour):
    """A size in base 256, and a pax size that goes before the header's."""
    content = encoded(5)
    info = tarfile.TarInfo("a.png")
    info.size = len(content)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + len(content).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    padding = b"\0" * (-len(content) % 512)
    (tmp_path / "a.tar").write_bytes(bytes(block) + content + padding + b"\0" * 1024)
    assert colour(open_images(tmp_path / "a.tar")[0]) == 5

    info.pax_headers = {"size": str(len(content)), "path": "猫/b.png"}
    header = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "b.tar").write_bytes(header + content + padding + b"\0" * 1024)
    assert [(s.id, colour(s)) for s in open_images(tmp_path / "b.tar")] == [("猫__b", 5)]


@pytest.mark.parametrize("cut", [100, 512, 513, 1024, 2100, -1, -512, -1024])
def test_an_archive_that_is_cut_short_is_an_error(write_tar, encoded, cut):
    path = write_tar("x.tar", [("a.png", b"a" * 600), ("b.png", b"b" * 600)])
    end = 2 * (512 + 1024)
    whole = path.read_bytes()[: end + 1024]
    path.write_bytes(whole[: cut if cut > 0 else end + 512 + cut])
    if cut == -1:
        path.write_bytes(whole[: end + 511])
    files = sum(1 for e in (512 + 600, 1536 + 512 + 600) if e <= path.stat().st_size)
    with pytest.raises(
        DatasetError, match=rf"x\.tar is cut short: it has {path.stat().st_size:,} bytes, {files} whole"
    ):
        open_images(path)
    path.write_bytes(whole[: end + 512])  # one zero block is an end mark
    assert len(open_images(path)) == 2


def test_files_that_are_no_archives(tmp_path, write_tar, encoded):
    (tmp_path / "text.tar").write_bytes(b"hello " * 400)
    with pytest.raises(DatasetError, match=r"The file .*text\.tar is no tar archive\."):
        open_images(tmp_path / "text.tar")
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DatasetError, match=r"empty\.tar is cut short: it has 0 bytes"):
        open_images(tmp_path / "empty.tar")
    for mode, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        with tarfile.open(tmp_path / "packed.tar", f"w:{mode}") as archive:
            archive.add(write_tar("x.tar", [("a.png", os.urandom(2000))]), "a.png")
        with pytest.raises(DatasetError, match=rf"is compressed \({name}\), so that .* Unpack it to a plain tar file"):
            open_images(tmp_path / "packed.tar")
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(DatasetError, match=r"The archive .*x\.tar\.gz is compressed"):
        open_images(tmp_path / "x.tar.gz")
    path = write_tar("broken.tar", [("a.png", encoded(0)), ("b.png", encoded(1))])
    content = bytearray(path.read_bytes())
    content[1024 + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.tar is damaged: there is no member header at byte 1,024"):
        open_images(path)


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "b.png"
        archive.addfile(info)
    with pytest.raises(
        DatasetError, match=r"a\.png in .*x\.tar is a symbolic link, not a file\. Pack .* --dereference"
    ):
        open_images(tmp_path / "x.tar")


def test_labels_that_cannot_be_read(write_tar, encoded):
    with pytest.raises(DatasetError, match=r"a\.cls in .*x\.tar is no label that can be read"):
        open_images(write_tar("x.tar", [("a.png", b""), ("a.cls", b"\xff")]))
    with pytest.raises(DatasetError, match=r"a\.json in .*x\.tar is no label that can be read"):
        open_images(write_tar("x.tar", [("a.png", b""), ("a.json", b"{")]))
    with pytest.raises(DatasetError, match=r"a\.json in .*x\.tar has the label 1\.5, which is neither"):
        open_images(write_tar("x.tar", [("a.png", b""), ("a.json", b'{"label": 1.5}')]))
    with pytest.raises(DatasetError, match=r"labels that are numbers \(3\) and labels that are names \('dog'\)"):
        open_images(write_tar("x.tar", [("a.png", b""), ("a.cls", b"3"), ("b.png", b""), ("b.cls", b"dog")]))


def test_broken_pictures_are_named_by_archive_and_member(write_tar, encoded):
    path = write_tar("x.tar", [("a.png", b"text"), ("b.png", encoded(1))])
    images = open_images(path)
    with pytest.raises(ImageError, match=r"Cannot decode .*x\.tar/a\.png: it is text, not a picture"):
        images[0].decode(**OPTIONS)
    os.truncate(path, 1600)
    with pytest.raises(ImageError, match=r"Cannot read b\.png in .*x\.tar: the archive ends \d+ bytes too early\."):
        images[1].decode(**OPTIONS)
    path.unlink()
    elsewhere = pickle.loads(pickle.dumps(images))  # has no files open, as in another process
    with pytest.raises(ImageError, match=r"Cannot read b\.png in .*x\.tar: No such file"):
        elsewhere[1].decode(**OPTIONS)


def test_many_threads_read_many_files_with_few_open(write_tar, encoded, colour, tmp_path):
    for i in range(12):
        write_tar(f"s/{i:02d}.tar", [(f"{i}-{j}.png", encoded(10 * i + j)) for j in range(5)])
    files = OpenFiles(limit=3)
    sizes = {p: os.path.getsize(p) for p in map(str, sorted((tmp_path / "s").iterdir()))}
    wrong = []

    def work(seed):
        generator = random.Random(seed)
        for _ in range(200):
            path = generator.choice(list(sizes))
            offset = generator.randrange(sizes[path])
            with open(path, "rb") as file:
                file.seek(offset)
                expected = file.read(700)
            if files.read(path, offset, 700) != expected:
                wrong.append(path)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(files._descriptors) <= 3
    images = open_images(tmp_path / "s")
    assert [colour(s) for s in images] == [10 * i + j for i in range(12) for j in range(5)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_no_open_files_are_left(write_tar, encoded):
    path = write_tar("x.tar", [("a.png", encoded(0))])

    def opened():
        links = (f"/proc/self/fd/{d}" for d in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and os.readlink(link) == str(path) for link in links)

    images = open_images(path)
    assert opened() == 0
    for _ in range(5):
        images[0].decode(**OPTIONS)
    assert opened() == 1
    del images
    assert opened() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_read_on_their_own(write_tar, encoded):
    path = write_tar("x.tar", [("a.png", encoded(3))])
    program = f"""
import os, sys
from amradio.images import open_images
images = open_images({str(path)!r})
expected = images[0].read()
lock = images.rows._files._lock
lock.acquire()  # as if another thread were reading at this moment
child = os.fork()
if child == 0:
    os._exit(0 if images[0].read() == expected else 1)
lock.release()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or images[0].read() != expected)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_fingerprints(write_tar, encoded):
    path = write_tar("x.tar", [("a.png", encoded(0)), ("b.png", encoded(1))])
    first = open_images(path).fingerprint
    assert open_images(path).fingerprint == first
    os.utime(path, ns=(1, 1))
    assert open_images(path).fingerprint != first
