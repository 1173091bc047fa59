# OpenBao beside the service on one host: one server, its root in data/openbao, unsealed by a key in a
# file. It sets itself up when it first starts: a transit key that cannot be read out, two policies, and
# two tokens whose texts secrets.sh chose. No root token is left behind.

cluster_addr = "https://openbao:8201"
api_addr     = "https://openbao:8200"
ui           = false

storage "raft" {
  path    = "/openbao/data"
  node_id = "filigrane"
}

listener "tcp" {
  address       = "0.0.0.0:8200"
  tls_cert_file = "/run/secrets/openbao.crt"
  tls_key_file  = "/run/secrets/openbao.tls"
}

# Whoever has this key and a copy of the storage has every key of every tenant: keep them apart.
seal "static" {
  current_key_id = "1"
  current_key    = "file:///run/secrets/openbao.seal"
}

# What is asked of the root, by whom and when; values are hashed by OpenBao.
audit "file" "stdout" {
  options = {
    file_path = "stdout"
  }
}

# A year instead of a month, for the tokens below.
max_lease_ttl     = "8760h"
default_lease_ttl = "8760h"

initialize "filigrane" {
  request "mount" {
    operation = "update"
    path      = "sys/mounts/transit"
    data = {
      type = "transit"
    }
  }

  request "root" {
    operation = "update"
    path      = "transit/keys/filigrane"
    data = {
      type                   = "aes256-gcm96"
      exportable             = false
      allow_plaintext_backup = false
    }
  }

  request "service-policy" {
    operation = "update"
    path      = "sys/policies/acl/filigrane"
    data = {
      policy = {
        eval_type   = "string"
        eval_source = "file"
        path        = "/openbao/config/service.policy.hcl"
      }
    }
  }

  request "operator-policy" {
    operation = "update"
    path      = "sys/policies/acl/operator"
    data = {
      policy = {
        eval_type   = "string"
        eval_source = "file"
        path        = "/openbao/config/operator.policy.hcl"
      }
    }
  }

  request "service-token" {
    operation = "update"
    path      = "auth/token/create-orphan"
    data = {
      id = {
        eval_type   = "string"
        eval_source = "file"
        path        = "/run/secrets/openbao.token"
      }
      display_name = "filigrane"
      policies     = ["filigrane"]
      period       = "8760h"
    }
  }

  request "operator-token" {
    operation = "update"
    path      = "auth/token/create-orphan"
    data = {
      id = {
        eval_type   = "string"
        eval_source = "file"
        path        = "/run/secrets/openbao.operator"
      }
      display_name = "operator"
      policies     = ["operator"]
      period       = "8760h"
    }
  }
}
