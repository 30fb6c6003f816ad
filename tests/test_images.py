# pytest tests/test_images.py
"""Pictures: the order of training, the split, scikit-learn's digits, and folders that somebody else has filled."""
import io
import random
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qtlm.batches import is_batches, mean_loss
from qtlm.data import DataError
from qtlm.images import ImageBatches, Images, digits, image_folder
from qtlm.storage import CheckpointMismatchError
from qtlm.trainer import Trainer


def numbered(count, classes=("a", "b", "c")):
    "Pictures that know their number, and labels that follow from it."
    return Images(torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 1, 2, 2), torch.arange(count) % len(classes), classes)


def numbers(images):
    return images[:, 0, 0, 0].int().tolist()


# ---- order and split ----

@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(-3, 2**70), start=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_each_epoch_shows_each_picture_once(count, batch_size, seed, start):
    batches = numbered(count).batches(batch_size, seed)
    x, y = batches[start]
    assert len(x) == batch_size and y.tolist() == [n % 3 for n in numbers(x)] and torch.equal(batches[start][0], x)
    steps = -(-2 * count // batch_size)
    seen = [n for i in range(steps) for n in numbers(batches[i][0])]
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))


def test_the_order_is_the_same_on_every_machine():
    "Drawn by whole numbers alone: these are the same wherever this test runs."
    assert numbers(numbered(10).batches(5, seed=3)[0][0]) == [7, 2, 3, 9, 6] and numbers(numbered(10).batches(5, seed=4)[0][0]) == [7, 8, 1, 2, 4]
    train, test = numbered(10).split(0.4, seed=3)
    assert numbers(train.images) == [6, 5, 4, 1, 8, 0] and numbers(test.images) == [7, 2, 3, 9]
    assert zlib.crc32(bytes(digits()[1].labels.tolist())) == 3756183891


@given(count=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_a_split_loses_nothing_and_shares_nothing(count, fraction, seed):
    pictures, kept = numbered(count), round(count * fraction)
    if not 0 < kept < count:
        with pytest.raises(DataError, match="split: test_fraction"):
            pictures.split(fraction, seed)
        return
    train, test = pictures.split(fraction, seed)
    assert len(test.labels) == kept and sorted(numbers(train.images) + numbers(test.images)) == list(range(count))
    assert train.classes == test.classes == pictures.classes


def test_nobody_has_trained_on_the_test_of_somebody_else():
    for seed in (0, 1):
        train, test = digits(seed=seed)
        held_out = {picture.tobytes() for picture in test.images.numpy()}
        for classes in (range(5), range(5, 10), (9, 0), [3]):
            part, part_test = digits(classes, seed=seed)
            assert not held_out & {picture.tobytes() for picture in part.images.numpy()}
            assert part.classes == tuple(map(str, classes)) and len(part_test.labels) == sum(int((test.labels == digit).sum()) for digit in classes)
            for place, digit in enumerate(classes):
                assert torch.equal(part.images[part.labels == place], train.images[train.labels == digit])
    assert not torch.equal(digits(seed=0)[1].labels, digits(seed=1)[1].labels)


@pytest.mark.parametrize("fields", [{"classes": []}, {"classes": [1, 1]}, {"classes": ["one"]}, {"classes": [10]}, {"test_fraction": 1.0}, {"test_fraction": "a"}, {"seed": 0.5}])
def test_digits_that_there_are_not(fields):
    with pytest.raises(DataError, match=r"^(classes|split|permute: seed).*; expected") as caught:
        digits(**fields)
    assert "\n" not in str(caught.value)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"digits: the library 'scikit-learn' is not installed; .* Run: pip install qtlm\[vit\]"):
        digits()


def test_neither_scikit_learn_nor_pillow_is_imported_before_it_is_used():
    code = "import sys, qtlm.images; print([m for m in ('sklearn', 'PIL', 'matplotlib', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("wrong", [
    {"images": torch.zeros(3, 8, 8)}, {"images": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)}, {"images": torch.zeros(3, 0, 8, 8)}, {"images": np.zeros((3, 1, 8, 8))},
    {"labels": torch.zeros(3)}, {"labels": torch.zeros(2, dtype=torch.int64)}, {"labels": [0, 0, 0]}, {"labels": torch.tensor([0, 1, 2])}, {"labels": torch.tensor([0, -1, 0])},
])  # fmt: skip
def test_what_are_no_labelled_pictures(wrong):
    fields = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3, dtype=torch.int64), "classes": ("a", "b")} | wrong
    with pytest.raises(DataError, match=r"^Images: (images|labels) .*; expected") as caught:
        Images(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"batch_size": 1.5}, {"seed": "a"}, {"seed": True}])
def test_batches_that_cannot_be(fields):
    with pytest.raises(DataError, match="expected a whole number"):
        numbered(5).batches(**fields)


# ---- with the trainer ----

class Mean(torch.nn.Module):
    "A model of two weights."
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(x.mean((1, 2, 3))[:, None])


def trainer(data, **fields):
    torch.manual_seed(0)
    return Trainer(Mean(), **({"train_data": data, "max_steps": 4, "progress": False} | fields))


def test_a_trainer_takes_them_for_training_and_for_evaluation():
    pictures = numbered(20)
    run = trainer(pictures.batches(8, seed=1), eval_data=pictures, eval_steps=2)
    history = run.train()
    assert len(history.losses) == 4 and run.evaluate()["loss"] == mean_loss(run.model, pictures, run.device)[0]
    assert run.tokens_seen == 4 * 8 and is_batches(pictures) and is_batches(pictures.batches())
    assert len(trainer(pictures).train().losses) == 4                           # in their own order, all of them a step
    with pytest.raises(DataError, match="eval_data: ImageBatches; expected"):   # it never ends
        trainer(pictures.batches(), eval_data=pictures.batches(), eval_steps=1).train()


def test_a_resumed_run_refuses_other_pictures(room):
    pictures = numbered(20)
    trainer(pictures.batches(8), output_dir=str(room)).train()
    others = {"sha256": Images(pictures.images + 1, pictures.labels, pictures.classes).batches(8), "seed": pictures.batches(8, seed=1), "batch_size": pictures.batches(4)}
    for name, other in others.items():
        with pytest.raises(CheckpointMismatchError, match=f"train_data: does not fit: {name}"):
            trainer(other, output_dir=str(room), max_steps=6).train(resume_from_checkpoint=True)
    assert len(trainer(pictures.batches(8), output_dir=str(room), max_steps=6).train(resume_from_checkpoint=True).losses) == 6


def test_description_is_plain_and_tells_apart():
    a = ImageBatches(torch.zeros(4, 1, 2, 2), torch.arange(4), 2)
    assert all(type(value) in (int, str, list) for value in a.to_dict().values()) and len(a.digest) == 64
    for images, labels in ((torch.zeros(4, 1, 2, 2) - 0.5, torch.arange(4)), (torch.zeros(4, 1, 2, 2), torch.arange(4).flip(0)), (torch.zeros(4, 1, 1, 4), torch.arange(4)),
                           (torch.zeros(4, 1, 2, 2).bfloat16(), torch.arange(4))):
        assert ImageBatches(images, labels, 2).to_dict()["sha256"] != a.to_dict()["sha256"]


# ---- folders ----

def file(room, name, image=None, **options):
    "Write a picture, or bytes, below `room`."
    path = room / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image) if isinstance(image, bytes) else (image or Image.new("RGB", (8, 8), "red")).save(path, **options)
    return path


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 9, 3), dtype=np.uint8))


NOT_WRITTEN = {"ppm": ("P", "CMYK"), "jpg": ("P", "RGBA"), "png": ("CMYK",), "bmp": ("CMYK",), "gif": ("CMYK",)}     # by Pillow
KINDS = [(s, m) for s in ("png", "bmp", "ppm", "tiff", "gif", "webp", "jpg") for m in ("1", "L", "P", "RGB", "RGBA", "CMYK") if m not in NOT_WRITTEN.get(s, ())]


@pytest.mark.parametrize("suffix, mode", KINDS)
def test_kinds_of_files(room, suffix, mode):
    file(room, f"a/x.{suffix}", NOISE.convert(mode))
    with Image.open(room / f"a/x.{suffix}") as again:
        want = [np.asarray(again.convert(m).resize((4, 4), Image.Resampling.BILINEAR), dtype=np.float32) for m in ("L", "RGB")]
    grey, colours = image_folder(room, 4, 1).images, image_folder(room, 4).images
    assert torch.equal(grey[0, 0], torch.tensor(want[0]) / 127.5 - 1) and torch.equal(colours[0], torch.tensor(want[1]).permute(2, 0, 1) / 127.5 - 1)
    assert colours.dtype == torch.float32 and colours.is_contiguous()


def test_as_transformers_prepares_pictures(room):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "ViTImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no ViTImageProcessorPil")
    file(room, "a/x.png", NOISE)
    want = processor(size={"height": 6, "width": 6})(NOISE, return_tensors="pt")["pixel_values"]
    assert (image_folder(room, 6).images - torch.as_tensor(want)).abs().max() <= 2**-22      # it divides by 255, subtracts a half and divides by a half


def test_classes_are_in_the_order_of_their_names(room):
    for name in ("b/1.png", "B/1.png", "a b/1.png", "ä/deep/er/1.png", "10/1.png", "9/1.png", "9/.DS_Store.png", ".git/1.png", "b/.thumbs/1.png"):
        file(room, name)
    file(room, "readme.txt", b"beside the classes")
    found = image_folder(str(room), 4)
    assert found.classes == ("10", "9", "B", "a b", "b", "ä") and found.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_folder_trains_a_model(room):
    for i in range(8):
        file(room, f"{'dark' if i % 2 else 'light'}/{i}.png", Image.new("L", (5, 7), 20 + i if i % 2 else 230 + i))
    train, test = image_folder(room, 4, 1).split(0.25)
    run = trainer(train.batches(4), eval_data=test, max_steps=60, learning_rate=0.1)
    run.train()
    assert (run.model(test.images)[:, :2].argmax(1) == test.labels).all()


@pytest.mark.parametrize("path", ["", None, 7, "a\0b", b"x\0"])
def test_what_names_no_folder(path):
    with pytest.raises(DataError, match="image_folder: path: .*; expected the path of a folder"):
        image_folder(path, 8)


def test_folders_that_cannot_be_read(room, monkeypatch):
    with pytest.raises(DataError, match="image_folder: 'aaa.*: File name too long; expected a folder that can be read"):
        image_folder("a" * 5000, 8)
    from pathlib import Path

    file(room, "a/x.png")
    monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match="Permission denied; expected a folder that can be read"):
        image_folder(room, 8)


@pytest.mark.parametrize("fields", [{"image_size": 0}, {"image_size": 2.0}, {"image_size": "8"}, {"num_channels": 2}, {"num_channels": True}])
def test_shapes_that_cannot_be(room, fields):
    file(room, "a/x.png")
    with pytest.raises(DataError, match="image_folder: (image_size|num_channels) .*; expected"):
        image_folder(room, **({"image_size": 8} | fields))


def bomb(side, mode="1"):
    "A file that is small, of a picture that is not."
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("side", [8200, 10000, 20000])
def test_a_bomb_is_not_unpacked(room, side):
    path = file(room, "a/x.png", bomb(side))
    assert path.stat().st_size < 60_000
    tracemalloc.start()
    start = time.process_time()
    warnings.simplefilter("error")                                              # one word is enough; pytest puts the filters back
    with pytest.raises(DataError, match=r"a/x.png': .*pixels; expected at most 67,108,864"):
        image_folder(room, 8)
    assert time.process_time() - start < 1 and tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_warnings_of_the_caller_stay(room):
    file(room, "a/x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        image_folder(room, 8)
        assert warnings.filters == before


@pytest.mark.parametrize("note, turn", [(1, lambda x: x), (3, lambda x: x.rot90(2, (1, 2))), (6, lambda x: x.rot90(-1, (1, 2))), (8, lambda x: x.rot90(1, (1, 2)))])
def test_a_camera_held_sideways(room, note, turn):
    square = NOISE.crop((0, 0, 9, 9))
    exif = square.getexif()
    exif[0x0112] = note
    file(room, "a/x.png", square, exif=exif)
    file(room, "b/x.png", square)
    turned, plain = image_folder(room, 9).images
    assert torch.equal(turned, turn(plain))


def test_photographs_with_a_preview_are_read_and_films_are_not(room):
    file(room, "a/x.jpg", NOISE, format="MPO", save_all=True, append_images=[NOISE.rotate(90)])
    with Image.open(room / "a/x.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert image_folder(room, 8).images.shape == (1, 3, 8, 8)
    for suffix in ("gif", "png", "webp", "tiff"):
        film = file(room, f"a/film.{suffix}", NOISE, save_all=True, append_images=[NOISE.rotate(90)])
        with pytest.raises(DataError, match=f"film.{suffix}': several pictures in one file; expected one"):
            image_folder(room, 8)
        film.unlink()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_named(room, seed):
    "Bytes cut off or changed: the picture is read, or one line names the file. Both must happen."
    rng, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"):
        whole = file(room, f"a/x.{suffix}", NOISE).read_bytes()
        for _ in range(25):
            data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(4)):
                if data:
                    data[rng.randrange(min(len(data), rng.choice([40, 10**6])))] = rng.randrange(256)
            path = file(room, f"a/x.{suffix}", bytes(data))
            try:
                assert image_folder(room, 4).images.isfinite().all()
                outcomes["read"] += 1
            except DataError as error:
                assert f"x.{suffix}'" in str(error) and "\n" not in str(error) and len(str(error)) < 400
                outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes.values()) > 25, outcomes


def test_other_decoders_are_not_started(room, monkeypatch):
    "Pillow hands EPS to Ghostscript; here no program is started for a file."
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    for name, data in {"x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "x.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"}.items():
        path = file(room, f"a/{name}", data)
        with pytest.raises(DataError, match=f"{name}': UnidentifiedImageError, cannot identify image file the file; expected a picture, BMP, GIF"):
            image_folder(room, 8)
        path.unlink()
