"""From a request's JSON to the token ids that the engines will see."""
