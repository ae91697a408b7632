"""What processes that train one model together exchange and agree on."""
