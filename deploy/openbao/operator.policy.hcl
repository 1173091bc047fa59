# What a person does to the root: a new version, a copy, its restoration, new tokens. An operator cannot
# compute with the root, but whoever makes tokens for the service can: keep the token offline.
path "transit/keys/filigrane" {
  capabilities = ["read"]
}

path "transit/keys/filigrane/rotate" {
  capabilities = ["update"]
}

path "sys/storage/raft/snapshot" {
  capabilities = ["read", "update"]
}

path "sys/storage/raft/snapshot-force" {
  capabilities = ["update"]
}

path "sys/policies/acl/filigrane" {
  capabilities = ["read", "update"]
}

path "auth/token/create-orphan" {
  capabilities = ["update", "sudo"]
}

path "auth/token/lookup-accessor" {
  capabilities = ["update"]
}

path "auth/token/renew-accessor" {
  capabilities = ["update"]
}

path "auth/token/revoke-accessor" {
  capabilities = ["update"]
}

path "auth/token/accessors" {
  capabilities = ["list", "sudo"]
}
