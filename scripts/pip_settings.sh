# Sourced. uv does not read pip's configuration: hand over what pip is set to use on this machine, if anything.
# shellcheck shell=bash
_hand_over() { # PYTHON PIP_NAME UV_VARIABLE SEPARATOR
    local value variable="PIP_${2//-/_}"
    variable="${variable^^}"
    [ -z "${!3:-}" ] || return 0
    value="${!variable:-$("$1" -m pip config get "global.$2" 2>/dev/null || true)}"
    [ -z "$value" ] || export "$3=$(echo "$value" | xargs | tr ' ' "$4")"
}

pip_settings_to_uv() { # PYTHON
    _hand_over "$1" find-links UV_FIND_LINKS ,
    _hand_over "$1" index-url UV_DEFAULT_INDEX ' '
    _hand_over "$1" cert SSL_CERT_FILE ' '
}
