"""A run that goes on notices when its shards are others, and one that wants every sample ends without it."""

import shutil

import pytest
import yaml
from training_runs import good_members, load, run_config, take, write_shard

from ig_captioner.data.shards import Skipped
from training.config import DataConfig, SourceConfig, UsageError
from training.train import train


def replace(path):
    """Another shard of the same size."""
    content = bytearray(path.read_bytes())
    content[600] ^= 1  # inside the first photo
    path.write_bytes(content)


CHANGES = {  # what happens to b.tar between the runs: what is said
    "gone": (lambda path: path.unlink(), "b.tar is gone"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5120]), "b.tar had 51,200 bytes and has 5,120"),
    "replaced": (replace, "b.tar has other content"),
    "added": (lambda path: shutil.copy(path, path.with_name("c.tar")), "c.tar is new"),
    "renamed": (lambda path: path.rename(path.with_name("d.tar")), "b.tar is gone; colors: d.tar is new"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cached", [True, False])
def test_resuming_with_other_shards_is_refused_or_said(workspace, tmp_path, caplog, change, cached):
    damage, message = CHANGES[change]
    (tmp_path / "shards").mkdir()
    for name in "ab":
        shutil.copy(workspace / "colors.tar", tmp_path / "shards" / f"{name}.tar")
    options = {"data.sources.colors.shards": "shards/[a-d].tar", "data_root": str(tmp_path)}
    options |= {"data.cache_in_memory": cached, "data.shuffle_buffer": 4}
    train(run_config(workspace, tmp_path / "run", max_steps=1, **options))
    options |= {"max_steps": 2, "resume": True}
    damage(tmp_path / "shards" / "b.tar")
    with pytest.raises(UsageError, match=rf"other shards than the checkpoint's: colors: {message}"):
        train(run_config(workspace, tmp_path / "run", **{**options, "max_steps": 1}))
    train(run_config(workspace, tmp_path / "run", **options, resume_with_changes=True))
    assert f"from step 1: colors: {message.split('; ')[0]}" in caplog.text
    assert (tmp_path / "run" / "final").is_dir() and yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


@pytest.mark.parametrize("cached", [True, False])
def test_a_strict_run_ends_at_the_first_sample_that_cannot_be_used(tmp_path, tokenizer, cached):
    write_shard(tmp_path / "s.tar", [*good_members(0, 4), ("broken.png", b""), ("broken.txt", b"a dog")])
    config = DataConfig({"x": SourceConfig(["s.tar"])}, cache_in_memory=cached, shuffle_buffer=2)
    data = load(config, tokenizer, tmp_path)
    skipped = data.skipped + [item for batch in take(data.loader, 3) for item in batch["skipped"]]
    assert Skipped("broken", "empty image file") in skipped
    config.strict = True
    with pytest.raises(UsageError, match="broken cannot be used: empty image file"):
        take(load(config, tokenizer, tmp_path).loader, 3)
