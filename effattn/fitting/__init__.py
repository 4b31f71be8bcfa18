"""The budget search: from a checkpoint and a limit to what each layer becomes (`effattn.fit`)."""
