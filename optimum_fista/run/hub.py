"""Push a finished model folder to the Hugging Face Hub."""

import glob
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from optimum_fista.run.checkpoints.checkpoint import CARD_FILE
from optimum_fista.run.checkpoints.output import all_names, model_files

logger = logging.getLogger(__name__)

_STEMS = ("model.", "model-*-of-*.", "packed.", "packed-*-of-*.", "pytorch_model.", "pytorch_model-*-of-*.")
_ENDINGS = ("safetensors", "safetensors.index.json", "bin", "bin.index.json")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
    revision: str | None = None,
) -> str:
    """Upload the files of a pruned model's folder to a model repository and return the URL of the commit.

    Only the files on the list in `fista/files.json` are uploaded: those that a run, `report` and `evaluate` wrote. A
    warning names the others. The Hub checks the metadata of the model card before anything is uploaded.

    The repository, and the branch `revision` (from the head of `main`), are created if absent. Files of the same name
    are replaced. Weights of a standard name (`model.safetensors`, ...), and `fista/`, that are on the branch but not in
    `folder` are deleted in the same commit, because they belong to another model.

    Args:
        folder: A folder that this package wrote.
        repo_id: `"namespace/name"`, or `"name"` for the namespace of the token's owner.
        private: Visibility of the repository; `None` takes what exists, or the namespace's default.
        token: Access token; `None` takes `HF_TOKEN` or the one stored by `hf auth login`.
        commit_message: First line of the commit.
        revision: Branch to push to; `None` is `main`.

    Raises:
        ValueError: If `folder` is not complete or not of this package, its card has metadata that the Hub refuses,
            `repo_id` is not a repository name, or `private` contradicts the visibility of an existing repository.
            Nothing has been uploaded.
        OSError: If the Hub refused or was not reached. `folder` is unchanged; the client's error is the cause.
    """
    folder = Path(folder).expanduser().resolve()
    names = model_files(folder)
    for pattern in ("fista/files.json", "config.json", "*.safetensors"):
        if not names or not any(folder.glob(pattern)):
            raise ValueError(f"folder='{folder}' has no {pattern} of optimum-fista: pass a folder that it wrote.")
    require_repo_id(repo_id)
    others = [name for name in all_names(folder) if name not in names and not name.startswith((".git/", ".cache/"))]
    if others:
        more = f" and {len(others) - 10} more" if len(others) > 10 else ""
        logger.warning(
            "Not uploaded, because they don't belong to the model: %s%s. `hf upload %s FILE` uploads one.",
            ", ".join(others[:10]),
            more,
            repo_id,
        )
    _require_valid_card(folder)
    api = HfApi(token=token)
    with _failures_explained(folder, repo_id, revision, others, private):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        found_private = private if private is None else api.model_info(repo_id).private
    if found_private != private:
        raise ValueError(
            f"private={private} was passed, but {repo_id!r} exists with private={found_private}: omit "
            "`private` to keep that, change the repository's settings, or pass another `repo_id`"
        )
    with _failures_explained(folder, repo_id, revision, others, private):
        if revision is not None and not revision.startswith("refs/"):  # a pull request's ref exists already
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in sorted(names)],
            delete_patterns=[*(stem + ending for stem in _STEMS for ending in _ENDINGS), "fista/*"],
        )
    logger.info("Pushed %s to %s", folder, commit.commit_url)
    return commit.commit_url


def _require_valid_card(folder: Path) -> None:
    """Have the Hub check the metadata of a folder's card, if it is reached: it would refuse the upload at its end."""
    file = folder / CARD_FILE
    try:
        if file.exists():
            ModelCard.load(file).validate()
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the metadata of the model card {str(file)!r} is not valid: {reason}. Mend it between the lines of --- "
            "at its top; nothing was uploaded."
        ) from error
    except Exception as error:  # whatever the client raises: the upload will explain it
        logger.info("The Hub did not check the model card: %s", error)


def require_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is not a repository name, pass 'namespace/name' or 'name': {error}"
        ) from None


@contextmanager
def _failures_explained(
    folder: Path, repo_id: str, revision: str | None, others: list[str], private: bool | None
) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no common base: httpx errors, RuntimeError of threads, ValueError
        branch = [] if revision is None else ["--revision", revision]
        without = [part for name in others for part in ("--exclude", glob.escape(name))]
        hidden = ["--private"] if private else []  # otherwise the command would make a public repository
        command = shlex.join(["hf", "upload", repo_id, str(folder), *hidden, *branch, *without])
        raise OSError(
            f"Pushing to {repo_id!r} failed, but the model folder is safe at {folder}. "
            f"Retry with `push_folder`, or in a shell with `{command}`. The cause: {error}"
        ) from error
