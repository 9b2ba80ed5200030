"""The endpoint engine: the same questions, put to a server that speaks OpenAI's chat protocol."""
