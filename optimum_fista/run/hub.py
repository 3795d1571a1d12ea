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
from optimum_fista.run.checkpoints.output_folder import LATER, MODEL_FILES, WEIGHTS, all_names, model_files

logger = logging.getLogger(__name__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
    revision: str | None = None,
) -> str:
    """Upload the files of a model folder to a model repository and return the URL of the commit.

    The Hub checks the metadata of the model card before anything is uploaded.
    Only files that belong to the model are uploaded: those that a run wrote, by its list in `fista/files.json`, a
    `report` and an `evaluate` into the folder. Without the list (a folder of Transformers, or of an older version),
    those with the names that Transformers and this package give. A warning names the other files.

    The repository, and the branch `revision` (from the head of `main`), are created if absent. Files of
    the same name are replaced; weights of a standard name (`model.safetensors`, ...) that are on the
    branch but not in `folder` are deleted in the same commit, because they belong to another model.

    Args:
        folder: a model folder with `config.json` and at least one `*.safetensors`.
        repo_id: `"namespace/name"`, or `"name"` for the namespace of the token's owner.
        private: visibility of the repository; `None` takes what exists, or the namespace's default.
        token: access token; `None` takes `HF_TOKEN` or the one stored by `hf auth login`.
        commit_message: first line of the commit.
        revision: branch to push to; `None` is `main`.

    Raises:
        ValueError: `folder` is not a complete model folder, its card has metadata that the Hub refuses, `repo_id` is
            not a repository name, or `private` contradicts the visibility of an existing repository. Nothing has been
            uploaded.
        OSError: the Hub refused or was not reached. `folder` is unchanged; the client's error is the cause.
    """
    folder = Path(folder).expanduser().resolve()
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise ValueError(
                f"folder='{folder}' holds no {pattern}: pass a model folder as `save_pretrained` writes it"
            )
    require_repo_id(repo_id)
    names = model_files(folder)
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
            delete_patterns=[*WEIGHTS, *(name for name in [*MODEL_FILES, *LATER] if name.startswith("fista/"))],
        )
    logger.info("Pushed %s to %s", folder, commit.commit_url)
    return commit.commit_url


def _require_valid_card(folder: Path) -> None:
    """Have the Hub check the metadata of a folder's card, if it can be reached: it would refuse the upload at its end.

    Raises:
        ValueError: If the metadata is refused.
    """
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
    """Refuse what is no name of a repository.

    Raises:
        ValueError: If so.
    """
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
