"""Every layout, from folders and from archives: what is found, which ids mean what, and what is refused."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amradio.errors import DatasetError, ImageError, OptionError
from amradio.images.segmentation import VOID, MaskError, open_segmentation, segmentation_splits
from amradio.images.segmentation.recognise import LAYOUTS

Write = Callable[..., Path]
Files = dict[str, bytes]


def values(path: Path, split: str | None = None, **options: object) -> list[list[int]]:
    """The ids in each mask."""
    pairs = open_segmentation(path, split, **options)
    return [np.unique(sample.load()[1]).tolist() for sample in pairs]


# ---- Pascal VOC ----


def test_voc(write: Write, voc: Files) -> None:
    path = write(voc)
    assert segmentation_splits(path) == ("train", "trainaug", "val")
    train = open_segmentation(path, "train")
    assert (train.layout, train.split, len(train), len(train.class_names)) == ("voc", "train", 2, 21)
    assert train.class_names[:2] == ("background", "aeroplane")
    assert train.class_names[15] == "person"
    assert train.ignore_index == VOID
    image, mask = train[1].load()
    assert (image.size, image.mode, mask.shape, mask.dtype) == ((8, 6), "RGB", (6, 8), np.uint8)
    assert np.unique(mask).tolist() == [1, VOID]
    assert train[0].id == train[0].image.id == "2007_000001"
    assert train[-1].mask.location == f"{path}/SegmentationClass/2007_000002.png"
    assert repr(train) == (
        f"<SegmentationSet {str(path)!r}, split 'train': 2 pictures with masks, 21 classes, layout voc>"
    )


def test_voc_trainaug_has_masks_of_its_own_and_keeps_the_order_of_its_list(write: Write, voc: Files) -> None:
    trainaug = open_segmentation(write(voc), "trainaug")
    assert trainaug.ids == ("2008_000004", "2007_000001", "2007_000002", "2008_000003")
    assert all("/SegmentationClassAug/" in sample.mask.location for sample in trainaug)
    assert values(write(voc, "again"), "trainaug") == [[3, 20], [0, 20], [1, 20], [2, 20]]


def test_voc_takes_the_folder_that_has_all_masks(write: Write, voc: Files) -> None:
    voc["ImageSets/Segmentation/mini.txt"] = b"2007_000001\n2008_000003\n"
    assert "/SegmentationClassAug/" in open_segmentation(write(voc), "mini")[0].mask.location


def test_voc_in_its_archive_folder_and_with_short_names(write: Write, voc: Files) -> None:
    renamed = {
        "VOCdevkit/VOC2012/" + n.replace("JPEGImages", "images").replace("ImageSets/Segmentation", "sets"): c
        for n, c in voc.items()
    }
    path = write(renamed)
    assert open_segmentation(path, "validation").ids == ("2009_000005",)
    assert open_segmentation(path, "val")[0].load()[0].size == (8, 6)


def test_classes_of_its_own(write: Write, voc: Files) -> None:
    path = write({**voc, "classes.txt": b"\xef\xbb\xbfbackground\r\nroad\r\n"})
    assert open_segmentation(path, "train").class_names == ("background", "road")
    with pytest.raises(MaskError, match=r"no class: 4 \(24 pixels\)\. Known are 0 to 1 and 255"):
        values(path, "val")
    assert open_segmentation(path, "val", classes=list("abcdef")).class_names == tuple("abcdef")


def test_classes_from_a_file(write: Write, voc: Files, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('["a", "b"]')
    assert open_segmentation(write(voc), "val", classes=tmp_path / "names.json").class_names == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sky\n\nroad\n", r"Line 2 of .*classes\.txt is empty"),
        ("façade".encode("latin-1"), r"classes\.txt is no text in UTF-8"),
        (b"x\n" * 256, r"classes\.txt names 256 classes\. There must be 1 to 255, as 255 means void"),
    ],
)
def test_class_files_that_are_refused(write: Write, voc: Files, content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_segmentation(write({**voc, "classes.txt": content}), "val")


def test_a_split_is_needed_and_must_exist(write: Write, voc: Files) -> None:
    path = write(voc)
    with pytest.raises(DatasetError, match=r"has the splits train, trainaug, val\. Say which one is meant"):
        open_segmentation(path)
    with pytest.raises(DatasetError, match=r"has no split 'test'\. Its splits are train, trainaug, val\."):
        open_segmentation(path, "test")


def test_missing_lists(write: Write, voc: Files) -> None:
    path = write({n: c for n, c in voc.items() if not n.startswith("ImageSets")})
    with pytest.raises(DatasetError) as missing:
        open_segmentation(path, "train")
    assert str(missing.value) == (
        f"{path} has no list of the split 'train': expected sets/train.txt or ImageSets/Segmentation/train.txt, with "
        "one name a line. Or give a list file, or leave the split out for all pictures."
    )
    assert len(open_segmentation(path)) == 5  # from SegmentationClassAug, which has them all


# ---- what does not fit ----


def test_orphans_are_named(write: Write, voc: Files) -> None:
    del voc["SegmentationClassAug/2008_000003.png"], voc["JPEGImages/2008_000004.jpg"]
    path = write(voc)
    with pytest.raises(DatasetError) as orphans:
        open_segmentation(path, "trainaug")
    assert str(orphans.value) == (
        f"In {path} (split trainaug), 1 listed name in {path}/ImageSets/Segmentation/trainaug.txt has no picture: "
        "2008_000004; 1 picture has no mask: JPEGImages/2008_000003.jpg (expected "
        "SegmentationClassAug/2008_000003.png). Pictures and masks are matched by name. `amradio data check` lists "
        "all; a list file chooses what to use."
    )


def test_masks_without_pictures_are_named(write: Write, plain: Files) -> None:
    del plain["images/a/1.png"], plain["images/9.png"]
    with pytest.raises(DatasetError, match=r"2 masks have no picture: masks/9\.png, masks/a/1\.png\. Pictures and"):
        open_segmentation(write(plain))


def test_many_orphans_are_counted(write: Write, plain: Files) -> None:
    path = write({n: c for n, c in plain.items() if not n.startswith("masks") or "a/2" in n})
    with pytest.raises(DatasetError, match=r"4 pictures have no mask: .* and 1 more\."):
        open_segmentation(path)


def test_wrong_sizes(write: Write, voc: Files, photo: Callable[..., bytes]) -> None:
    voc["JPEGImages/2009_000005.jpg"] = photo(size=(8, 6))
    sample = open_segmentation(write(voc), "val")[0]
    with pytest.raises(MaskError, match=r"is 8 x 6 pixels \(width x height\), and its picture is 6 x 8"):
        sample.load()
    assert sample.mask.read().shape == (6, 8)


def test_rgb_masks(write: Write, voc: Files, photo: Callable[..., bytes]) -> None:
    voc["SegmentationClass/2009_000005.png"] = photo(fmt="PNG")
    with pytest.raises(MaskError, match="no index mask: it is a picture of mode RGB, with 1 colours such as"):
        values(write(voc), "val")


def test_masks_that_are_all_void_are_allowed(write: Write, voc: Files, png: Callable[..., bytes]) -> None:
    voc["SegmentationClass/2009_000005.png"] = png(np.full((6, 8), VOID))
    assert values(write(voc), "val") == [[VOID]]


def test_broken_pictures(write: Write, voc: Files) -> None:
    voc["JPEGImages/2009_000005.jpg"] = b"no picture"
    with pytest.raises(ImageError, match="Cannot decode"):
        values(write(voc), "val")


def test_two_pictures_of_one_name(write: Write, voc: Files, photo: Callable[..., bytes]) -> None:
    voc["JPEGImages/2009_000005.png"] = photo(fmt="PNG")
    with pytest.raises(DatasetError, match=r"two pictures of one name: .*2009_000005\.\w+ and .*Remove one"):
        open_segmentation(write(voc), "val")


# ---- ADE20K, Cityscapes ----


def test_ade20k(write: Write, ade20k: Files) -> None:
    path = write(ade20k)
    assert segmentation_splits(path) == ("training", "validation")
    train = open_segmentation(path, "train")
    assert (train.layout, len(train), len(train.class_names), train.ignore_index) == ("ade20k", 3, 150, VOID)
    assert (train.class_names[0], train.class_names[149]) == ("wall", "flag")
    assert values(path, "val") == [[0, 149, VOID]] * 2
    assert train.ids[0] == "ADE_train_00000000"


def test_ade20k_as_hummingbird_reads_it(write: Write, ade20k: Files) -> None:
    path = write(ade20k)
    train = open_segmentation(path, "training", variant="hbird")
    assert (len(train.class_names), train.class_names[0], train.ignore_index) == (151, "unlabelled", 0)
    assert values(path, "training", variant="hbird") == [[0, 1, 150]] * 3
    assert train.fingerprint != open_segmentation(path, "training").fingerprint
    assert train.select([0]).ignore_index == 0


def test_classes_can_be_renamed_but_not_left_out(write: Write, ade20k: Files) -> None:
    path = write(ade20k)
    names = [f"class {i}" for i in range(150)]
    assert open_segmentation(path, "val", classes=names).class_names == tuple(names)
    with pytest.raises(DatasetError, match=r"3 classes were named, and the layout ade20k has 150: wall, building"):
        open_segmentation(path, "val", classes=["a", "b", "c"])


def test_cityscapes(write: Write, cityscapes: Files) -> None:
    path = write(cityscapes)
    assert segmentation_splits(path) == ("train", "val")
    train = open_segmentation(path, "train")
    assert train.ids == ("aachen_000000_000019", "bochum_000000_000019")
    assert (train.layout, len(train.class_names), train.class_names[18]) == ("cityscapes", 19, "bicycle")
    mask = train[0].load()[1]
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    expected |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    ids = np.resize(np.arange(34), (6, 8))
    np.testing.assert_array_equal(mask, np.vectorize(lambda i: expected.get(i, VOID))(ids))
    with pytest.raises(DatasetError, match="has no split 'test'"):
        open_segmentation(path, "test")


def test_cityscapes_lists_name_files(write: Write, cityscapes: Files, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png\n")
    pairs = open_segmentation(write(cityscapes), "train", list_file=tmp_path / "list.txt")
    assert pairs.ids == ("bochum_000000_000019",)


def test_cityscapes_without_masks(write: Write, cityscapes: Files) -> None:
    del cityscapes["gtFine/train/bochum/bochum_000000_000019_gtFine_labelIds.png"]
    with pytest.raises(DatasetError, match=r"expected gtFine/train/\*/bochum_000000_000019_gtFine_labelIds\.png"):
        open_segmentation(write(cityscapes), "train")


# ---- any folder ----


def test_any_two_trees(write: Write, plain: Files) -> None:
    path = write(plain)
    assert segmentation_splits(path) == ()
    pairs = open_segmentation(path)
    assert (pairs.layout, pairs.split, pairs.class_names) == ("folder", None, ("sky", "road", "façade"))
    assert pairs.names == ("9", "10", "a/1", "a/2", "b/1")  # in natural order
    assert pairs.ids == ("9", "10", "a__1", "a__2", "b__1")
    assert values(path) == [[1, VOID], [0, VOID], [0, VOID], [1, VOID], [2, VOID]]


def test_splits_that_hold_both_trees(write: Write, plain: Files) -> None:
    files = {f"{s}/{n}": c for s in ("train", "valid") for n, c in plain.items() if n != "classes.txt"}
    path = write({**files, "classes.txt": plain["classes.txt"]})
    assert segmentation_splits(path) == ("train", "valid")
    pairs = open_segmentation(path, "val")
    assert len(pairs) == 5
    assert pairs[0].mask.location == f"{path}/valid/masks/9.png"
    with pytest.raises(DatasetError, match="has the splits train, valid"):
        open_segmentation(path)


def test_splits_in_both_trees(write: Write, plain: Files) -> None:
    files = {n.replace("/", f"/{s}/", 1): c for s in ("train", "val") for n, c in plain.items() if "/" in n}
    path = write({**files, "classes.txt": plain["classes.txt"]})
    assert segmentation_splits(path) == ("train", "val")
    assert open_segmentation(path, "training")[0].mask.location == f"{path}/masks/train/9.png"
    with pytest.raises(DatasetError, match="has the splits train, val"):
        open_segmentation(path)
    with pytest.raises(DatasetError, match="has no split 'test'"):
        open_segmentation(path, "test")


def test_splits_by_lists(write: Write, plain: Files) -> None:
    path = write({**plain, "sets/train.txt": b"a/1\nb/1.png\n"})
    assert open_segmentation(path, "train").names == ("a/1", "b/1")
    assert open_segmentation(path).names == ("a/1", "b/1")  # the only list


def test_classes_are_needed(write: Write, plain: Files) -> None:
    del plain["classes.txt"]
    path = write(plain)
    with pytest.raises(DatasetError, match=r"has no file classes\.txt, so that the ids in the masks have no meaning"):
        open_segmentation(path)
    assert len(open_segmentation(path, classes=["a", "b", "c"])) == 5


def test_trees_without_pictures(write: Write, plain: Files) -> None:
    path = write({"classes.txt": plain["classes.txt"], "images/notes.txt": b"", "masks/notes.txt": b""})
    with pytest.raises(DatasetError, match="There are no pictures in "):
        open_segmentation(path)


def test_hidden_files_do_not_count(write: Write, plain: Files) -> None:
    path = write({**plain, "images/._9.png": b"", "images/.trash/a.png": b"", "masks/.DS_Store": b""})
    assert len(open_segmentation(path)) == 5


def test_cities_with_the_same_file_name(write: Write, cityscapes: Files) -> None:
    for name in [n for n in cityscapes if "train/aachen" in n]:
        cityscapes[name.replace("train/aachen", "train/zurich")] = cityscapes[name]
    with pytest.raises(DatasetError, match=r"two pictures of one name: .*aachen/aachen_.* and .*zurich/aachen_"):
        open_segmentation(write(cityscapes), "train")


def test_ids_are_unique_file_names(write_folder: Write, plain: Files) -> None:
    plain["images/a__1.png"], plain["masks/a__1.png"] = plain["images/a/1.png"], plain["masks/a/1.png"]
    ids = open_segmentation(write_folder(plain)).ids
    assert len({i.lower() for i in ids}) == 6
    assert sum(i.startswith("a__1-") for i in ids) == 2


# ---- lists ----


@pytest.mark.parametrize(
    "line",
    [
        "2008_000003",
        "2008_000003.jpg",
        "JPEGImages/2008_000003.jpg",
        "/JPEGImages/2008_000003.jpg /SegmentationClassAug/2008_000003.png",
        "./JPEGImages/2008_000003.jpg",
    ],
)
def test_list_files(write: Write, voc: Files, tmp_path: Path, line: str) -> None:
    (tmp_path / "mine_aug.txt").write_text(f"# mine\n\n{line}\n2007_000001\n")
    path = write(voc)
    assert open_segmentation(path, list_file=tmp_path / "mine_aug.txt").ids == ("2008_000003", "2007_000001")


def test_a_list_file_in_the_data_set(write: Write, voc: Files) -> None:
    path = write({**voc, "lists/few.txt": b"2007_000002\n"})
    assert open_segmentation(path, list_file="lists/few.txt").ids == ("2007_000002",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n# nothing\n", r"The list .*list\.txt is empty"),
        (b"\xff\xfe\x00", r"The list .*list\.txt is no text in UTF-8"),
        (b"2007_000001\n2007_000001.jpg\n", r"names 2007_000001\.jpg twice"),
        (b"1999_000001\n", r"1 listed name in .*list\.txt has no picture: 1999_000001"),
    ],
)
def test_lists_that_are_refused(write: Write, voc: Files, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_segmentation(write(voc), list_file=tmp_path / "list.txt")


def test_a_list_that_is_missing(write: Write, voc: Files) -> None:
    with pytest.raises(DatasetError, match=r"The list nowhere\.txt cannot be read: No such file"):
        open_segmentation(write(voc), list_file="nowhere.txt")


# ---- finding the layout ----


def test_layouts_are_recognised(
    write: Write,
    voc: Files,
    ade20k: Files,
    cityscapes: Files,
    coco_thing: Files,
    coco_panoptic: Files,
    coco_stuff: Files,
    coco_instances: Files,
    plain: Files,
) -> None:
    kinds = {
        "voc": voc,
        "ade20k": ade20k,
        "cityscapes": cityscapes,
        "coco-thing": coco_thing,
        "coco-stuff": coco_stuff,
        "coco-instances": coco_instances,
        "folder": plain,
    }
    assert list(kinds) == list(LAYOUTS)
    for name, files in [*kinds.items(), ("coco-thing", coco_panoptic)]:
        path = write(files, f"{name}-{len(files)}")
        split = next(iter(segmentation_splits(path)), None)
        found = open_segmentation(path, split)
        assert found.layout == name
        assert found.fingerprint == open_segmentation(path, split, layout=name).fingerprint
        assert pickle.loads(pickle.dumps(found))[0].load()[1].shape == (6, 8)


def test_no_data_set(write: Write, voc: Files, photo: Callable[..., bytes], tmp_path: Path) -> None:
    path = write({"cats/1.jpg": photo(), "dogs/1.jpg": photo()})
    with pytest.raises(DatasetError) as nothing:
        open_segmentation(path)
    assert str(nothing.value) == (
        f"{path} is no data set of pictures with masks. It has the folders cats, dogs. Known layouts: voc, ade20k, "
        "cityscapes, coco-thing, coco-stuff, coco-instances, folder."
    )
    path = write({n: c for n, c in voc.items() if "Class" not in n}, "half")
    with pytest.raises(DatasetError, match=r"Of what is needed, voc lacks SegmentationClass \(masks\); folder lacks"):
        open_segmentation(path)
    with pytest.raises(DatasetError, match=r"in the layout ade20k .* ade20k lacks images/training \(pictures\) and"):
        open_segmentation(path, layout="ade20k")
    with pytest.raises(DatasetError, match="There is no folder or tar archive"):
        open_segmentation(tmp_path / "nowhere")


def test_unknown_layouts_and_variants(write: Write, voc: Files) -> None:
    path = write(voc)
    with pytest.raises(OptionError, match=r"There is no layout 'cityscape'\. Nearest names: cityscapes"):
        open_segmentation(path, layout="cityscape")
    with pytest.raises(OptionError, match=r"no variant 'fungi' of a data set: clean or hbird"):
        open_segmentation(path, "val", variant="fungi")


def test_several_data_sets(write: Write, voc: Files, plain: Files) -> None:
    path = write({**{f"a/{n}": c for n, c in voc.items()}, **{f"b/{n}": c for n, c in plain.items()}})
    with pytest.raises(DatasetError, match=r"several data sets: .*/a \(voc\), .*/b \(folder\)\. Name one of these"):
        open_segmentation(path)
    assert len(open_segmentation(path, layout="folder")) == 5


def test_compressed_archives(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(np.random.default_rng(0).bytes(2000))
    with tarfile.open(tmp_path / "voc.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x.txt")
    with pytest.raises(DatasetError, match=r"is compressed \(gzip\)"):
        open_segmentation(tmp_path / "voc.tar.gz")
