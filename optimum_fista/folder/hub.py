"""Push a finished model folder to the Hugging Face Hub, or find out before a run that this would fail.

`HfApi.upload_folder` makes one commit that adds the files on the model's list and deletes those of an earlier model. So
nobody downloads half of a model, or one model's weights with another model's report.

The list is `fista/files.json` in the folder; `folder.output` writes it. `require_push` is called before a run,
`push_folder` after it.
"""

import glob
import logging
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from optimum_fista.folder.output import all_names, model_files
from optimum_fista.source.links import leads_out

logger = logging.getLogger(__name__)

_STEMS = (
    "model.",
    "model-*-of-*.",
    "packed.",
    "packed-*-of-*.",
    "pytorch_model.",
    "pytorch_model-*-of-*.",
)
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

    Only the files on the list in `fista/files.json` are uploaded: those that a run, `report` and `evaluate` wrote, and
    those that a run copied from the dense model's folder. A warning names the others. The Hub checks the metadata of
    the model card first. The repository and the branch are created if they do not exist. Files of the same name are
    replaced. Weights of a standard name (`model.safetensors`, ...) and files in `fista/` that are on the branch but not
    in `folder` are deleted in the same commit, because they belong to another model.

    Args:
        folder: A folder that this package wrote.
        repo_id: `"namespace/name"`, or `"name"` for the namespace of the token's owner.
        private: Visibility of the repository; `None`: as it is, or the namespace's default for a new one.
        token: Access token; `None` takes `HF_TOKEN` or the one stored by `hf auth login`.
        commit_message: First line of the commit.
        revision: Branch to push to; a new one starts at the head of `main`. `None` is `main`.

    Raises:
        OSError: If the Hub refused or was not reached. `folder` is unchanged; the client's error is the cause.
    """
    folder = Path(folder).expanduser().resolve()
    listed = {name for name in model_files(folder) if not leads_out(folder / name, folder)}
    for pattern in ("fista/files.json", "config.json", "*.safetensors"):
        if not listed or not any(folder.glob(pattern)):
            raise ValueError(
                f"folder='{folder}' has no {pattern} of optimum-fista: pass a folder that it wrote."
            )
    require_repo_id(repo_id)
    _warn_of_others(folder, listed, repo_id)

    api = HfApi(token=token)
    try:
        # With the namespace, if it was left out.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # An existing repository keeps its visibility, whatever was asked.
        has_other_visibility = False
        if private is not None:
            has_other_visibility = api.model_info(repo_id).private != private
        if not has_other_visibility:
            return _upload(
                api,
                repo_id=repo_id,
                folder=folder,
                names=listed,
                commit_message=commit_message,
                revision=revision,
            )
    except Exception as error:  # no common base: httpx errors, RuntimeError of threads, ValueError
        raise OSError(
            f"Pushing to {repo_id!r} failed, but the model folder is safe at {folder}. Retry with `push_folder`. "
            f"The cause: {error}"
        ) from error
    # Raised outside of the `try`, which would take it for a failure of the Hub.
    raise ValueError(
        f"private={private} was passed, but {repo_id!r} exists with private={not private}: omit `private` to keep "
        "that, change the repository's settings, or pass another `repo_id`"
    )


def _upload(
    api: HfApi,
    *,
    repo_id: str,
    folder: Path,
    names: Collection[str],
    commit_message: str,
    revision: str | None,
) -> str:
    """Upload the files `names` of a folder in one commit, and return its URL; other arguments as in `push_folder`."""
    # The ref of a pull request exists already.
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Patterns of all names that weights may have. Files that match are deleted, unless they are uploaded now.
    weights = [stem + ending for stem in _STEMS for ending in _ENDINGS]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        allow_patterns=[glob.escape(name) for name in sorted(names)],
        delete_patterns=[*weights, "fista/*"],
    )
    return commit.commit_url


def _warn_of_others(folder: Path, listed: set[str], repo_id: str) -> None:
    """Log a warning that names the files of a folder that are not uploaded, because they are not among `listed`.

    Nothing is said of files that Git or the Hub's client keep in the folder. `listed` are names of files relative to
    `folder`, such as "fista/report.json". `repo_id` is for the message.
    """
    others = []
    for name in all_names(folder):
        is_of_git = name.startswith((".git/", ".cache/"))
        if name not in listed and not is_of_git:
            others.append(name)
    if others:
        shown = ", ".join(others[:10])
        if len(others) > 10:
            shown += f" and {len(others) - 10} more"
        logger.warning(
            "Not uploaded (`hf upload %s FILE` does), as no files of the model: %s.", repo_id, shown
        )


def require_push(repo_id: str, token: str | None = None) -> None:
    """Check the name, the token and the namespace of a push before hours are spent on the model. Changes nothing.

    Args:
        repo_id: `"namespace/name"`, or `"name"`.
        token: Access token; `None` takes `HF_TOKEN` or the one stored by `hf auth login`.

    Raises:
        ValueError: If `repo_id` is no name of a repository, or if the token may not write there.
        OSError: If the Hub refused the token or was not reached.
    """
    require_repo_id(repo_id)
    try:
        user = HfApi(token=token).whoami()
    except Exception as error:  # no common base: httpx errors, OSError of the client
        first_line = str(error).partition("\n")[0]
        raise OSError(
            f"repo_id={repo_id!r} can't be pushed to, and nothing was done: {first_line}"
        ) from error

    # `user` is what the Hub says of the owner of the token.
    organizations = [organization["name"] for organization in user.get("orgs", ())]
    namespaces = [user["name"], *organizations]
    namespace = user["name"]  # of a name without one
    if "/" in repo_id:
        namespace = repo_id.partition("/")[0]
    if namespace not in namespaces:
        possible = " or ".join(f"'{name}/'" for name in namespaces)
        raise ValueError(
            f"repo_id={repo_id!r}: {user['name']}, whose token this is, can't write to {namespace!r}: pass a "
            f"repository name that starts with {possible}"
        )
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":  # tokens of other roles may write, or write to some repositories
        raise ValueError(
            f"repo_id={repo_id!r}: the token can only read: make one that can write (https://hf.co/settings/tokens), "
            "and run `hf auth login` with it, or set HF_TOKEN to it"
        )


def require_repo_id(repo_id: str) -> None:
    """Refuse a text that is not the name of a repository (ValueError)."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is not a repository name, pass 'namespace/name': {error}"
        ) from None
