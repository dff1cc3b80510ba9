# Sourced. uv does not read pip's configuration: hand over the local wheel folders that pip is set to use, if any.
# shellcheck shell=bash
pip_find_links_to_uv() { # PYTHON
    local links
    links="${PIP_FIND_LINKS:-$("$1" -m pip config get global.find-links 2>/dev/null || true)}"
    if [ -z "${UV_FIND_LINKS:-}" ] && [ -n "$links" ]; then
        UV_FIND_LINKS="$(echo "$links" | xargs | tr ' ' ',')"
        export UV_FIND_LINKS
    fi
}
