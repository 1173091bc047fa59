# What the service asks of OpenBao or Vault, and no more: it computes with the root, and can neither
# read it out, make another, rotate nor delete it.
path "transit/keys/filigrane" {
  capabilities = ["read"]
}

path "transit/hmac/filigrane" {
  capabilities = ["update"]
}

path "transit/encrypt/filigrane" {
  capabilities = ["update"]
}

path "transit/decrypt/filigrane" {
  capabilities = ["update"]
}
