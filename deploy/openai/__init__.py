"""OpenAI's JSON to our requests and back."""
