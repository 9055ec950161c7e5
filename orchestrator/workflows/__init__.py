"""The stories that commands tell, each one readable function over the layers below."""
