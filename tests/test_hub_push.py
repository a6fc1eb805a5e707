"""From a checkpoint to a repository of a small Hub on loopback, and back into processes that have no package."""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from hub_server import OWNER, TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from small_checkpoint import save_checkpoint
from test_hub import WITHOUT_THE_PACKAGE, run_python

from ig_captioner import IGCaptionerForZeroShotImageClassification, IGCaptionerWarning
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.release import RELEASE_FILES, push_release, save_release


REPO = f"{OWNER}/tiny"
LABELS = ["cat", "dog", "photo of a cat"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """For this process; others need `HF_ENDPOINT`."""
    with HubServer() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # transformers keeps a client, which would look for the server of the test before
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "source")


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.vision_model.embeddings.projection.weight"
    save_file({**weights, name: weights[name].flip(0)}, folder / "model.safetensors", metadata={"format": "pt"})


def scores_of(folder: Path, photo: Path) -> list[float]:
    model, processor = load_model(IGCaptionerForZeroShotImageClassification, folder), load_processor(folder)
    texts = [f"a photo of a {label}." for label in LABELS]
    with torch.no_grad():
        scores = model.score(**processor(images=str(photo), text=texts, return_tensors="pt"))
    return scores.information_gain[0].tolist()


# What is uploaded


def test_a_push_uploads_a_release_and_leaves_the_folder_alone(server, checkpoint):
    model = load_model(IGCaptionerForZeroShotImageClassification, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20kB")  # several files, which a release joins
    (checkpoint / "optimizer.pt").write_text("not for the Hub")
    before = sorted(path.name for path in checkpoint.iterdir())

    url = push_release(checkpoint, REPO)

    assert url == f"{server.url}/{REPO}/commit/{server.repositories[REPO].branches['main']}"
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    files = server.files(REPO)
    assert set(files) == {*RELEASE_FILES, "card.yaml", "model.safetensors", ".gitattributes"}
    card = files["README.md"].decode()
    assert f'model="{REPO}"' in card
    assert ModelCard(card).data.pipeline_tag == "zero-shot-image-classification"


def test_a_second_push_replaces_the_first_and_keeps_the_files_of_others(server, checkpoint, tmp_path):
    push_release(checkpoint, REPO)
    repository, released = server.repositories[REPO], server.files(REPO)
    of_others = {"LICENSE", "photos/model.py"}
    of_an_older_release = {"old_ig_captioner.py", "results/old.json", "model-00001-of-00002.safetensors"}
    repository.add("main", {**released, **dict.fromkeys(of_others | of_an_older_release, b"old")}, "by hand")
    release = save_release(tmp_path / "release", checkpoint)
    change_weights(release)
    server.take_requests()

    url = push_release(release, REPO, commit_message="Better")

    assert set(server.files(REPO)) == set(released) | of_others
    assert repository.messages[url.rsplit("/", 1)[1]] == "Better"
    requests = server.take_requests()
    assert sum("/commit/" in request for request in requests) == 1
    assert sum(request.startswith("PUT /lfs/") for request in requests) == 1  # the weights


def test_files_are_uploaded_as_they_are_and_listed_with_their_digests(server, checkpoint, tmp_path):
    release = save_release(tmp_path / "release", checkpoint)

    push_release(release, REPO)

    uploaded = server.files(REPO)
    for path in release.iterdir():
        content = path.read_bytes()
        if path.name == "README.md":  # the name that the card's examples load
            content = content.replace(b'"release"', f'"{REPO}"'.encode()).replace(b"# release", f"# {REPO}".encode())
        assert uploaded[path.name] == content or path.name == "release.json", path.name
    digests = json.loads(uploaded["release.json"])["sha256"]
    assert digests == {name: hashlib.sha256(uploaded[name]).hexdigest() for name in digests}
    assert set(digests) == set(uploaded) - {"release.json", ".gitattributes"}


def test_a_push_of_nothing_new_makes_no_commit(server, checkpoint, tmp_path):
    release = save_release(tmp_path / "release", checkpoint)
    url = push_release(release, REPO)
    commits = len(server.repositories[REPO].commits)

    assert push_release(release, REPO) == url
    assert len(server.repositories[REPO].commits) == commits


def test_branches_and_private_repositories(server, checkpoint):
    url = push_release(checkpoint, REPO, private=True, revision="next")
    repository = server.repositories[REPO]
    assert repository.private and url.endswith(repository.branches["next"])
    assert list(server.files(REPO)) == [".gitattributes"] and "config.json" in server.files(REPO, "next")
    push_release(checkpoint, REPO, revision="next")  # the branch is there already


def test_what_the_hub_holds_can_be_released_again(server, checkpoint, tmp_path):
    (checkpoint / "card.yaml").write_text("title: Small\nlicense: mit\n")
    push_release(checkpoint, REPO)
    folder = save_release(tmp_path / "mine", REPO, repo_id="me/mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and "# Small" in card.text and 'model="me/mine"' in card.text
    server.repositories[REPO].add("main", {**server.files(REPO), "README.md": b"# My own"}, "by hand")
    files = server.files(REPO)
    files.pop("card.yaml")
    assert (save_release(tmp_path / "own", REPO) / "README.md").read_bytes() == b"# My own"


# What is refused


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "acme/ti ny", "acme/-tiny", "", f"acme/{'x' * 97}", "acme/tiny.git"])
def test_bad_names_are_refused(server, checkpoint, name):
    with pytest.raises(ValueError) as caught:
        push_release(checkpoint, name)
    assert repr(name) in one_line(caught) and not server.requests


def test_the_hub_may_refuse(server, checkpoint, monkeypatch):
    with pytest.raises(OSError, match=f"^'someone/tiny' was not pushed to {server.url}: .*rights to write") as caught:
        push_release(checkpoint, "someone/tiny")
    one_line(caught)
    with pytest.raises(OSError, match="Invalid credentials") as caught:
        push_release(checkpoint, REPO, token="hf_wrong")
    assert "hf_wrong" not in one_line(caught) and not server.repositories

    (checkpoint / "README.md").write_text("---\nlicence: mit\n---\n# Typo\n")
    with pytest.raises(OSError, match='"licence" is not allowed') as caught:
        push_release(checkpoint, REPO)
    assert one_line(caught) and list(server.files(REPO)) == [".gitattributes"]

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"'acme/tiny' was not pushed to http://127\.0\.0\.1:9: .+") as caught:
        push_release(checkpoint, REPO)
    one_line(caught)


def test_without_a_token_or_a_checkpoint_nothing_is_asked(server, checkpoint, tmp_path, monkeypatch):
    for folder in (tmp_path / "missing", tmp_path, checkpoint / "config.json"):
        with pytest.raises(OSError) as caught:
            push_release(folder, REPO)
        assert str(folder) in one_line(caught)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(PermissionError, match="no token.*HF_TOKEN") as caught:
        push_release(checkpoint, REPO)
    assert one_line(caught) and not server.requests


def test_a_broken_release_is_not_pushed(server, checkpoint, tmp_path):
    release = save_release(tmp_path / "release", checkpoint)
    config = (release / "config.json").read_text()
    (release / "config.json").write_text(config.replace("modeling_ig_captioner.", "modeling_old."))
    with pytest.raises(ValueError, match=r"config.json refers to modeling_old\.\w+, which is not in the release"):
        push_release(release, REPO)
    (release / "config.json").write_text(config)
    os.truncate(release / "model.safetensors", 999)
    with pytest.raises(Exception, match="header"):
        push_release(release, REPO)
    assert not server.requests


def test_code_of_strangers_stays_here(server, checkpoint, tmp_path):
    """A release that was changed: what goes up is a release of its checkpoint, and that is said."""
    release = save_release(tmp_path / "release", checkpoint)
    own = (release / "modeling_ig_captioner.py").read_bytes()
    (release / "modeling_ig_captioner.py").write_bytes(own + b"import os\n")
    (release / "backdoor_ig_captioner.py").write_text("import os\n")
    with pytest.warns(IGCaptionerWarning, match=r"not as release wrote it.*2: 'backdoor_ig.*, 'modeling_ig"):
        push_release(release, REPO)
    files = server.files(REPO)
    assert files["modeling_ig_captioner.py"] == own and "backdoor_ig_captioner.py" not in files
    # not even where the manifest is changed with it
    digests = json.loads((release / "release.json").read_text())
    digests["sha256"]["modeling_ig_captioner.py"] = hashlib.sha256(own + b"import os\n").hexdigest()
    digests["sha256"]["backdoor_ig_captioner.py"] = hashlib.sha256(b"import os\n").hexdigest()
    (release / "release.json").write_text(json.dumps(digests))
    with pytest.warns(IGCaptionerWarning, match=r"not as release wrote it.*'modeling_ig"):
        push_release(release, REPO)
    files = server.files(REPO)
    assert files["modeling_ig_captioner.py"] == own and "backdoor_ig_captioner.py" not in files


@pytest.mark.parametrize("name", ["README.md", "results/secret.json", "chat_template.jinja"])
@pytest.mark.parametrize("is_release", [True, False])
def test_links_to_files_elsewhere_are_not_followed(server, checkpoint, tmp_path, name, is_release):
    (tmp_path / "secret").write_text("a secret")
    folder = save_release(tmp_path / "release", checkpoint) if is_release else checkpoint
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IGCaptionerWarning)
        with pytest.raises(ValueError, match=f"{name} is a link to a file elsewhere"):
            push_release(folder, REPO)
        with pytest.raises(ValueError, match=f"{name} is a link to a file elsewhere"):
            save_release(tmp_path / "another", folder)
    assert not server.requests and not (tmp_path / "another").exists()


# Clean processes

IN_ANOTHER_PROCESS = """
import json, sys
from transformers import pipeline

scores = []
for job in json.loads(sys.argv[1]):
    saved = job.pop("save_to", None)
    classifier = pipeline("zero-shot-image-classification", trust_remote_code=True, **job)
    assert type(classifier).__name__ == "IGZeroShotImageClassificationPipeline"
    labels = json.loads(sys.argv[2])
    rows = classifier("photo.jpg", candidate_labels=labels, return_log_likelihoods=True)
    gains = {row["label"]: row["information_gain"] for row in rows}
    scores.append([gains[label] for label in labels])
    if saved:
        classifier.save_pretrained(saved)
print(json.dumps(scores))
"""


@pytest.fixture
def elsewhere(server, tmp_path):
    """Runs pipelines in a process that has no package, but a cache of the Hub. Returns their scores."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((30, 20)).save(tmp_path / "photo.jpg")

    def run(*jobs: dict, offline: bool = False) -> list[list[float]]:
        server.take_requests()
        arguments = (WITHOUT_THE_PACKAGE + IN_ANOTHER_PROCESS, json.dumps(jobs), json.dumps(LABELS))
        return run_python(tmp_path, *arguments, HF_ENDPOINT=server.url, HF_HUB_OFFLINE=str(int(offline)))

    return run


def test_pushed_twice_loaded_pinned_saved_and_offline(server, checkpoint, tmp_path, elsewhere):
    """Two processes: one that loads both revisions and saves the first, one that has them from the cache alone."""
    old = scores_of(checkpoint, tmp_path / "photo.jpg")
    revision = push_release(checkpoint, REPO).rsplit("/", 1)[1]
    change_weights(checkpoint)
    new = scores_of(checkpoint, tmp_path / "photo.jpg")
    assert abs(torch.tensor(old) - torch.tensor(new)).max() > 1e-2
    newer = push_release(checkpoint, REPO).rsplit("/", 1)[1]

    pinned = {"model": REPO, "revision": revision}
    online = elsewhere({**pinned, "save_to": "saved"}, {"model": REPO})
    requests = server.take_requests()
    needed = {*RELEASE_FILES} - {"README.md", "release.json", "generation_config.json"}
    assert {f"GET /{REPO}/resolve/{revision}/{name}" for name in needed} <= {*requests}
    assert not [request for request in requests if request.startswith(f"GET /{REPO}/resolve/{newer}/")]  # the same ...
    assert sum(request.startswith("GET /lfs/") for request in requests) == 2  # ... but for the weights

    offline = elsewhere(pinned, {"model": REPO}, {"model": "saved"}, offline=True)
    assert not server.requests
    for scores, reference in zip([*online, *offline], [old, new, old, new, old], strict=True):
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(reference), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_cached_model_is_asked_after_but_not_downloaded(server, checkpoint, elsewhere):
    push_release(checkpoint, REPO)
    first = elsewhere({"model": REPO})
    assert elsewhere({"model": REPO}) == first
    asked = f"GET /api/models/{REPO}"
    about_it = sorted(request for request in server.take_requests() if REPO in request)
    assert about_it == [asked, f"{asked}/tree/main", f"{asked}/tree/main/additional_chat_templates"]
