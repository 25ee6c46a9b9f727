"""A mkdocs hook for links from `docs/` to the rest of the repository, which work on GitHub but not on the built site.

Pictures are copied to the site; links to other files become their text. A link to nothing stops the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's pictures to the site, as `pictures/NAME.png`."""
    for picture in sorted((Path(config.config_file_path).parent / "launch").glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page that leave `docs/`."""
    folder = posixpath.dirname(page.file.src_uri)
    root = Path(config.config_file_path).parent

    def rewritten(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link[0]
        if path.startswith("..") or not (root / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        if not mark:
            return text
        return f"![{text}]({posixpath.relpath('pictures/' + posixpath.basename(path), folder or '.')})"

    return _LINK.sub(rewritten, markdown)
