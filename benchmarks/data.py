"""What the data commands cost at size: `prepare`, `prepare` again, `verify` and `asd`.

    python benchmarks/data.py OUT [--samples 100000] [--images 20000] [--only prepare verify …]

Makes a LLaVA JSON file of synthetic questions on drawn JPEG images of 160×120 pixels in OUT, once, and a tenth as many
to test on. Then runs each command in a process of its own, from an empty cache, and prints and writes (`OUT/data.json`)
seconds, CPU seconds, samples a second and peak memory, sampled ten times a second: the largest resident set of one
process, files that are mapped included, and what all processes of the command have allocated. `imports` is what is
imported to check trainer arguments and to count tokens. `--only decoders` compares ways to use the cores on the images.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw

import mcit.recipes
from mcit.data_prep.files import write_json
from mcit.data_prep.image_files import map_images
from mcit.data_prep.verify.pictures import look_at

MCIT = "from mcit.pipeline.cli import main; main()"
IMPORTS = "from transformers import AutoProcessor, TrainingArguments"
SIDES = (160, 120)
COLOURS = ("red", "green", "blue", "orange", "purple", "brown", "black", "gray")
RECIPE = """
name: size
base_model: {{path: {model}, dtype: float32}}
stream:
  - {{name: shapes, train: train.json, test: test.json, images: images, style: short}}
"""


def make(out: Path, samples: int, images: int) -> None:
    """Write `train.json`, a tenth as many rows in `test.json` on images of their own, the images, and a recipe."""
    for part, count, pictures, seed in (("train", samples, images, 0), ("test", samples // 10, images // 10, 1)):
        rng = random.Random(seed)
        rows = []
        for number in range(pictures):
            draw(out / "images" / part / f"{number // 1000:03d}" / f"{number:06d}.jpg", rng)
        for number in range(count):
            shown = number * pictures // count
            colour, other, answer = rng.choice(COLOURS), rng.choice(COLOURS), rng.randint(0, 12)
            question = f"How many {colour} shapes are to the left of the {other} one? (question {number})"
            turns = [
                {"from": "human", "value": f"<image>\n{question}\nAnswer the question using a single word or phrase."},
                {"from": "gpt", "value": str(answer)},
            ]
            image = f"{part}/{shown // 1000:03d}/{shown:06d}.jpg"
            rows.append({"id": f"{part}-{number}", "image": image, "conversations": turns})
        (out / f"{part}.json").write_text(json.dumps(rows))


def draw(path: Path, rng: random.Random) -> None:
    """A picture of coloured shapes; no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIDES, tuple(rng.randint(120, 255) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        left, top, size = rng.randint(0, SIDES[0] - 20), rng.randint(0, SIDES[1] - 20), rng.randint(10, 40)
        form = rng.choice((pen.rectangle, pen.ellipse))
        form((left, top, left + size, top + size), fill=rng.choice(COLOURS), outline="white")
    image.save(path, quality=85)


def measure(code: str, arguments: list[str], cache: Path) -> dict[str, float]:
    """Run `python -c code arguments`; seconds, and peak memory in MB: resident of one, allocated by all."""
    environment = os.environ | {"MCIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    start, before = time.monotonic(), os.times()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)
    peak = {"resident": 0.0, "allocated": 0.0}

    def watch() -> None:
        while process.poll() is None:
            sizes = [memory(pid) for pid in family(process.pid)]
            peak["resident"] = max(peak["resident"], *(resident for resident, _ in sizes))
            peak["allocated"] = max(peak["allocated"], sum(allocated for _, allocated in sizes))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - start, "cpu_seconds": cpu, "exit": code, **peak}


def compare_decoders(out: Path) -> None:
    """Print how many images a second `verify` looks at alone, in threads and in processes, each on all cores."""
    paths = sorted((out / "images" / "train").rglob("*.jpg"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ways = {
            "alone": lambda: list(map(look_at, paths)),
            "threads": lambda: list(pool.map(look_at, paths)),
            "processes": lambda: list(map_images(look_at, paths)),
        }
        for name, look in ways.items():
            start = time.monotonic()
            look()
            print(f"{name:10} {len(paths) / (time.monotonic() - start):6.0f} images/s", flush=True)


def family(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, thread.read_text().split())
            except OSError:
                continue  # it ended
    return found


def memory(pid: int) -> tuple[float, float]:
    """Resident and allocated memory of a process (Rss and Pss_Anon of Linux) in MB, or 0 if it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return found.get("Rss", 0), found.get("Pss_Anon", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "test.json").exists():
        make(out, arguments.samples, arguments.images)
    if arguments.only == ["decoders"]:
        compare_decoders(out)
        return
    model = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"
    (out / "recipe.yaml").write_text(RECIPE.format(model=model))
    for made in ("cache", "run"):
        shutil.rmtree(out / made, ignore_errors=True)
    cache, run = out / "cache", ["--run-dir", str(out / "run")]
    commands = {
        "prepare": (MCIT, ["prepare", str(out / "recipe.yaml"), *run]),
        "prepare again": (MCIT, ["prepare", str(out / "recipe.yaml"), *run]),
        "verify": (MCIT, ["verify", str(out / "recipe.yaml")]),
        "asd": (MCIT, ["asd", str(out / "train.json"), str(out / "asd.jsonl"), "--images", str(out / "images")]),
        "imports": (IMPORTS, []),
    }
    results = {}
    for name, (code, command) in commands.items():
        if arguments.only and name not in arguments.only:
            continue
        found = measure(code, command, cache)
        results[name] = {key: round(value, 1) for key, value in found.items()}
        rate = arguments.samples / found["seconds"]
        print(
            f"{name:14} exit {found['exit']}  {found['seconds']:6.1f} s  {found['cpu_seconds']:6.1f} s of CPU  "
            f"{rate:8.0f} samples/s  "
            f"resident {found['resident']:5.0f} MB  allocated {found['allocated']:5.0f} MB",
            flush=True,
        )
    write_json(out / "data.json", results)


if __name__ == "__main__":
    main()
