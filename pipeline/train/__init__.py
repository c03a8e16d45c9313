"""Rows to an adapter: our words to TRL's, PEFT's and bitsandbytes'; the loop is theirs."""
