"""Sending a checked folder to the Hub, and what its refusals mean.

What is surprising: an interrupted upload needs no memory of its own. huggingface_hub asks the Hub what it already
has, so the same command again sends the rest; a pull request is the exception, each run opens another one.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .export_settings import Exported
from .repository import IGNORED_FOLDERS, KINDS, Kind
from .repository_check import read_card

CLIENT_ERROR = HfHubHTTPError.__bases__[0]
"""What a lost connection raises: the error of httpx up to huggingface_hub 1.x, of httpx2 from 2.0 on (errors.py)."""
_CARD_REFUSED = "the Hub refuses this, most often for the card: correct the metadata at the top of README.md"
_MEANINGS = {
    400: _CARD_REFUSED,
    401: "the Hub does not know this token; get one that may write at https://huggingface.co/settings/tokens and run "
    "`hf auth login`, or set HF_TOKEN",
    403: "this token may not write there; get one with the right to, at https://huggingface.co/settings/tokens",
    404: "there is no such repository, or this token may not see it",
    409: "the name is taken by something else, or somebody else is writing; choose another --repo-id or try again",
    413: "a file is larger than the Hub takes; save the model in smaller shards",
    422: _CARD_REFUSED,
    429: "too many requests; try again later",
}
"""What an answer of the Hub means for a person who pushes."""


def push_repository(exported: Exported, repo_id: str, *, private: bool = True, pull_request: bool = False) -> str:
    """Create or update a repository.

    Args:
        exported: Folder that `prepare_repository` checked.
        private: Whether nobody else sees a new repository; an existing one must not be more open than that.
        pull_request: Propose the files to an existing repository instead of writing them.

    Returns:
        The address of the commit or pull request.

    Raises:
        ValueError: saying what the Hub's refusal means.
    """
    api = HfApi()
    try:
        user = api.whoami()
        if not pull_request:
            _check_owner(user, repo_id)
        return _push(api, exported.folder, repo_id, KINDS[exported.kind], private=private, pull_request=pull_request)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"got no token of the Hub; expected one: {_MEANINGS[401]}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("got HF_HUB_OFFLINE=1; expected to be online to push: take it out") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        meaning = _MEANINGS.get(status, "try again later; what was sent stays there, and the same command goes on")
        raise ValueError(f"got {status} from the Hub for {repo_id} ({error.server_message}): {meaning}") from error
    except (CLIENT_ERROR, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"got an interrupted upload to {repo_id} ({error}: {cause}); expected a connection: run the same command "
            "again, which sends what is missing"
        ) from error


def _check_owner(user: dict[str, Any], repo_id: str) -> None:
    """Refuse a name of somebody else.

    `create_repo(exist_ok=True)` takes their public repository for its own (huggingface_hub 2.4, hf_api.py).
    """
    owner = repo_id.split("/")[0]
    own = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if "/" in repo_id and owner not in own:
        raise ValueError(
            f"got {repo_id}, which belongs to {owner}; expected a repository of {', '.join(own)}: choose another "
            "--repo-id, or propose the files with --pull-request"
        )


def _push(api: HfApi, folder: Path, repo_id: str, kind: Kind, *, private: bool, pull_request: bool) -> str:
    repo_type = kind.repo_type
    if not pull_request:
        sdk = read_card(folder).metadata["sdk"] if repo_type == "space" else None
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    if private and not pull_request and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"got {repo_id}, which exists and is public; expected a private one: give --public to go on")
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            create_pr=pull_request,
            delete_patterns=kind.list_replaced(),
            ignore_patterns=[f"{start}{name}/**" for name in IGNORED_FOLDERS for start in ("", "**/")],
            commit_message="Upload with llava push",
        )
    except ValueError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        if isinstance(error.__cause__, BadRequestError):
            reason = " ".join(str(error).split())
            raise ValueError(f"got 400 from the Hub for {repo_id} ({reason}): {_CARD_REFUSED}") from error
        raise ValueError(f"got files that the Hub refuses for {repo_id}: {error}; expected smaller ones") from error
    return commit.pr_url if pull_request else commit.commit_url
