// What chatting needs in Azure: the file share with the tuned model, an environment with the GPU, and the app.
//
// `python infra/azure.py provision inference` deploys it with the values of inference.parameters.json, which is where
// to change them. A resource whose name is given there must exist, and is used as it is. If the name is empty, the
// resource is created; its name is the same in every deployment, so deploying again updates it.
// finetuning.bicep creates or uses the same share and logs, with identical code, and its own environment: so each can
// have another GPU, and deploying one never affects the other.

// ---- Parameters

@description('The name of the workspace. Names and tags of the created resources are derived from it.')
param projectName string

@description('The Azure region. It must offer the GPU, and all named existing resources must be in it.')
param location string

@description('What the app runs in the workspace, in order; it stops at the first command that fails.')
@minLength(1)
param defaultCommands array

@description('The hardware to rent, one of `sizes` below. Consumption has no GPU: enough for the demo model.')
param workloadProfileType string

@description('The name of that profile in the environment. Only needed for an existing environment.')
param workloadProfileName string = workloadProfileType == 'Consumption' ? 'Consumption' : 'gpu'

@description('The maximum instances of a dedicated profile (NC…-A100): each is billed while anything runs on it.')
@minValue(1)
param maximumInstanceCount int

// Existing resources in this resource group, which are used as they are.
@description('An existing storage account, for the file share. Empty: one is created.')
param storageAccountName string
@description('An existing file share in that account. Empty: one is created.')
param fileShareName string
@description('An existing Container Apps environment. Empty: one is created.')
param acaEnvironmentName string
@description('An existing storage of that environment, for writing to the share. Empty: one is created.')
param acaEnvironmentStorageName string
@description('An existing Log Analytics workspace, for the logs. Empty: one is created.')
param acaLogAnalyticsName string

@description('The name of the app, which is created or updated. Empty: one is derived from projectName.')
param acaAppName string

// Users of the page must then log in with your organisation first; programs use the API with the key.
@description('The client id of an app registration in Entra ID. Empty: no login, the key alone.')
param entraClientId string

// For example [{ "name": "office", "action": "Allow", "ipAddressRange": "203.0.113.0/24" }]
@description('The addresses from which the app can be reached. Empty: all, with the key.')
param ipSecurityRestrictions array

// `az containerapp secret show --secret-name chat-api-key` shows it.
@secure()
@description('The key of the app: password of the page, bearer token of the API. If not given, Azure generates one.')
param chatApiKey string = newGuid()

// It must use Azure RBAC and have the secrets hf-token and chat-api-key.
@description('An existing key vault of this resource group, for the secrets. Empty: none.')
param keyVaultName string

@secure()
@description('A token of the Hugging Face hub, for gated models; not needed with a key vault. Empty: no token.')
param hfToken string = ''

@secure()
@description('Seals the Python environments on the share, the same for the job and the app. infra/azure.py draws it.')
param environmentKey string = newGuid()

@description('The SHA-256 of the code that runs; infra/azure.py sets it with each start. none: nothing was sent yet.')
param codeSha256 string = 'none'

// uv 0.9.30 on Python 3.12 and Debian 12, as tagged ghcr.io/astral-sh/uv:0.9.30-python3.12-bookworm-slim. A tag can be
// moved, a digest cannot; many public Dockerfiles name this one. For a newer one, put what this prints into both files:
//   docker buildx imagetools inspect ghcr.io/astral-sh/uv:VERSION-python3.12-bookworm-slim
@description('The container image, pinned by its digest. It must have bash, Python 3.11 to 3.13, and uv.')
param image string = 'ghcr.io/astral-sh/uv@sha256:e5b65587bce7de595f299855d7385fe7fca39b8a74baa261ba1b7147afa78e58'

@description('Tags of all created resources, in addition to `workspace`, by which infra/azure.py finds them.')
param tags object

// ---- Derived values

// As large as the profile allows. A container on a serverless profile has one GPU, on a dedicated one all GPUs.
var sizes = {
  Consumption: { cpu: 4, memory: '8Gi' }
  'Consumption-GPU-NC8as-T4': { cpu: 8, memory: '56Gi' }
  'Consumption-GPU-NC24-A100': { cpu: 24, memory: '220Gi' }
  'NC24-A100': { cpu: 24, memory: '220Gi' }
  'NC48-A100': { cpu: 48, memory: '440Gi' }
  'NC96-A100': { cpu: 96, memory: '880Gi' }
}
var size = sizes[workloadProfileType]

var allTags = union(tags, { workspace: projectName })
// Without hyphens, since a name cannot have two in a row.
var uniqueName = '${take(replace(projectName, '-', ''), 12)}-${take(uniqueString(resourceGroup().id, projectName), 6)}'
var storageName = empty(storageAccountName) ? 'st${uniqueString(resourceGroup().id, projectName)}' : storageAccountName
var shareName = empty(fileShareName) ? uniqueName : fileShareName
var environmentName = empty(acaEnvironmentName) ? 'env-app-${uniqueName}' : acaEnvironmentName
var environmentStorageName = empty(acaEnvironmentStorageName) ? 'share-${uniqueName}' : acaEnvironmentStorageName
var logsName = empty(acaLogAnalyticsName) ? 'log-${uniqueName}' : acaLogAnalyticsName
var appName = empty(acaAppName) ? 'app-${uniqueName}' : acaAppName

// Python environments contain links; without byte-range locks, since nothing else writes to locked files.
var mountOptions = 'mfsymlinks,nobrl'
var mountVariables = [
  { name: 'WORKSPACE_MOUNT', value: '/mount' }
  { name: 'HF_HOME', value: '/mount/.cache/huggingface' } // a model is downloaded once
  { name: 'PYTHONUNBUFFERED', value: '1' }
  { name: 'CODE_SHA256', value: codeSha256 }
  { name: 'ENVIRONMENT_KEY', secretRef: 'environment-key' }
]
var start = loadTextContent('../start.sh')
var environmentSecret = { name: 'environment-key', value: environmentKey }
// The same as in setup/no_telemetry.py, for commands that do not import it.
var noTelemetry = [
  { name: 'ORT_DISABLE_TELEMETRY', value: '1' }
  { name: 'OLIVE_DISABLE_TELEMETRY', value: '1' }
  { name: 'HF_HUB_DISABLE_TELEMETRY', value: '1' }
  { name: 'HF_UPDATE_DOWNLOAD_COUNTS', value: '0' }
  { name: 'GRADIO_ANALYTICS_ENABLED', value: 'False' }
  { name: 'DO_NOT_TRACK', value: '1' }
  { name: 'CI', value: '1' }
  { name: 'MLFLOW_DISABLE_TELEMETRY', value: 'true' }
  { name: 'WANDB_ERROR_REPORTING', value: 'false' }
]

var health = { path: '/health', port: 7860 }
var issuer = '${environment().authentication.loginEndpoint}${tenant().tenantId}/v2.0'

var vaultSecrets = 'https://${keyVaultName}${environment().suffixes.keyvaultDns}/secrets'
var tokenSecret = empty(keyVaultName)
  ? { name: 'hf-token', value: hfToken }
  : { name: 'hf-token', keyVaultUrl: '${vaultSecrets}/hf-token', identity: identity.id }
var hasToken = !empty(hfToken) || !empty(keyVaultName)
var keySecret = empty(keyVaultName)
  ? { name: 'chat-api-key', value: chatApiKey }
  : { name: 'chat-api-key', keyVaultUrl: '${vaultSecrets}/chat-api-key', identity: identity.id }

// Nothing was sent yet, and Azure refuses an app that never responds. In that case this start serves only /health;
// `deploy` sends the workspace, and restarts the app.
var answerHealth = 'mkdir -p /tmp/new/health && exec python3 -m http.server 7860 --directory /tmp/new'
var prepare = 'source infra/environment.sh && python setup/get_model.py'
var isNew = '[ "$CODE_SHA256" = none ]'

// ---- The share with the workspace, the models and the Python environments

resource newStorage 'Microsoft.Storage/storageAccounts@2025-06-01' = if (empty(storageAccountName)) {
  name: storageName
  location: location
  tags: allTags
  sku: { name: 'Standard_LRS' } // only stored data is billed
  kind: 'StorageV2'
  properties: {
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    allowBlobPublicAccess: false
    allowCrossTenantReplication: false
    // Container Apps mount a share over SMB only with the account's key.
    allowSharedKeyAccess: true
    // Your machine sends the workspace here, and an environment without its own network has no fixed address:
    // there is no address range to restrict access to.
    publicNetworkAccess: 'Enabled'
  }
}

resource newFileService 'Microsoft.Storage/storageAccounts/fileServices@2025-06-01' = if (empty(storageAccountName)) {
  parent: newStorage
  name: 'default'
  properties: {
    protocolSettings: {
      smb: { versions: 'SMB3.1.1', channelEncryption: 'AES-128-GCM;AES-256-GCM', authenticationMethods: 'NTLMv2' }
    }
    shareDeleteRetentionPolicy: { enabled: true, days: 7 }
  }
}

resource storage 'Microsoft.Storage/storageAccounts@2025-06-01' existing = { name: storageName }

resource fileService 'Microsoft.Storage/storageAccounts/fileServices@2025-06-01' existing = {
  parent: storage
  name: 'default'
}

resource newShare 'Microsoft.Storage/storageAccounts/fileServices/shares@2025-06-01' = if (empty(fileShareName)) {
  parent: fileService
  name: shareName
  properties: {
    accessTier: 'TransactionOptimized' // a Python environment has many small files
    shareQuota: 1024 // GiB, the maximum
  }
  dependsOn: [newFileService]
}

// ---- The environment with the GPU, and its logs

resource newLogs 'Microsoft.OperationalInsights/workspaces@2025-07-01' = if (empty(acaLogAnalyticsName) && empty(acaEnvironmentName)) {
  name: logsName
  location: location
  tags: allTags
  properties: {
    sku: { name: 'PerGB2018' }
    retentionInDays: 30 // included in the price of the logs
    workspaceCapping: { dailyQuotaGb: 1 }
  }
}

resource log 'Microsoft.OperationalInsights/workspaces@2025-07-01' existing = { name: logsName }

var consumptionProfile = { name: 'Consumption', workloadProfileType: 'Consumption' }
// Azure refuses counts for a serverless profile; a dedicated one has no instance while it is idle.
var isServerless = startsWith(workloadProfileType, 'Consumption')
var counts = isServerless ? {} : { minimumCount: 0, maximumCount: maximumInstanceCount }
var gpuProfile = union({ name: workloadProfileName, workloadProfileType: workloadProfileType }, counts)

resource newEnvironment 'Microsoft.App/managedEnvironments@2025-07-01' = if (empty(acaEnvironmentName)) {
  name: environmentName
  location: location
  tags: allTags
  properties: {
    workloadProfiles: workloadProfileType == 'Consumption' ? [consumptionProfile] : [consumptionProfile, gpuProfile]
    appLogsConfiguration: {
      destination: 'log-analytics'
      logAnalyticsConfiguration: { customerId: log.properties.customerId, sharedKey: log.listKeys().primarySharedKey }
    }
  }
  dependsOn: [newLogs]
}

resource containerEnvironment 'Microsoft.App/managedEnvironments@2025-07-01' existing = { name: environmentName }

resource newEnvironmentStorage 'Microsoft.App/managedEnvironments/storages@2025-07-01' = if (empty(acaEnvironmentStorageName)) {
  parent: containerEnvironment
  name: environmentStorageName
  properties: {
    azureFile: {
      accountName: storageName
      accountKey: storage.listKeys().keys[0].value
      shareName: shareName
      accessMode: 'ReadWrite'
    }
  }
  dependsOn: [newEnvironment, newShare]
}

resource readOnlyStorage 'Microsoft.App/managedEnvironments/storages@2025-07-01' = {
  parent: containerEnvironment
  name: 'read-${uniqueName}'
  properties: {
    azureFile: {
      accountName: storageName
      accountKey: storage.listKeys().keys[0].value
      shareName: shareName
      accessMode: 'ReadOnly'
    }
  }
  dependsOn: [newEnvironment, newShare]
}

// ---- The identity of the containers, and its access: the secrets of the key vault, if there is one

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2024-11-30' = {
  name: 'id-${uniqueName}'
  location: location
  tags: allTags
}

resource vault 'Microsoft.KeyVault/vaults@2025-05-01' existing = { name: empty(keyVaultName) ? 'none' : keyVaultName }

var keyVaultSecretsUser = '4633458b-17de-408a-874b-0445c86b69e6' // the role, the same in every subscription
resource vaultAccess 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(keyVaultName)) {
  scope: vault
  name: guid(vault.id, identity.id)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', keyVaultSecretsUser)
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
  }
}

// ---- The app

resource app 'Microsoft.App/containerApps@2025-07-01' = {
  name: appName
  location: location
  tags: allTags
  identity: { type: 'UserAssigned', userAssignedIdentities: { '${identity.id}': {} } }
  properties: {
    environmentId: containerEnvironment.id
    workloadProfileName: workloadProfileName
    configuration: {
      activeRevisionsMode: 'Single'
      // For everyone with the key: without one, inference/gradio_chat.py does not start.
      ingress: { external: true, targetPort: 7860, allowInsecure: false, ipSecurityRestrictions: ipSecurityRestrictions }
      secrets: hasToken ? [keySecret, environmentSecret, tokenSecret] : [keySecret, environmentSecret]
      // Azure reads the key vault with it; the containers cannot use it.
      identitySettings: [{ identity: identity.id, lifecycle: 'None' }]
    }
    template: {
      // Before the app: the Python environment and the base model, unless a run already put them on the share.
      initContainers: [
        {
          name: 'prepare'
          image: image
          command: ['bash', '-euo', 'pipefail', '-c']
          args: ['if ${isNew}; then exit; fi\n${start}${prepare}']
          env: concat(mountVariables, noTelemetry, hasToken ? [{ name: 'HF_TOKEN', secretRef: 'hf-token' }] : [])
          resources: { cpu: 2, memory: '4Gi' }
          volumeMounts: [{ volumeName: 'workspace', mountPath: '/mount' }]
        }
      ]
      containers: [
        {
          name: 'inference'
          image: image
          command: ['bash', '-euo', 'pipefail', '-c']
          args: ['if ${isNew}; then ${answerHealth}; fi\n${start}${join(defaultCommands, ' && ')}']
          env: concat(mountVariables, noTelemetry, [
            { name: 'HF_HUB_OFFLINE', value: '1' }
            { name: 'CHAT_API_KEY', secretRef: 'chat-api-key' }
          ])
          resources: { cpu: size.cpu, memory: size.memory }
          volumeMounts: [{ volumeName: 'read-only', mountPath: '/mount' }]
          probes: [
            // Ten times a minute: loading libraries and model from the share takes minutes.
            { type: 'Startup', httpGet: health, periodSeconds: 60, failureThreshold: 10 }
            { type: 'Readiness', httpGet: health, periodSeconds: 10 }
            { type: 'Liveness', httpGet: health, periodSeconds: 30, timeoutSeconds: 10 }
          ]
        }
      ]
      volumes: [
        { name: 'workspace', storageType: 'AzureFile', storageName: environmentStorageName, mountOptions: mountOptions }
        { name: 'read-only', storageType: 'AzureFile', storageName: readOnlyStorage.name, mountOptions: mountOptions }
      ]
      // The first request starts the app, and it stops five minutes after the last one: until then the GPU is billed.
      scale: { minReplicas: 0, maxReplicas: 1, cooldownPeriod: 300 }
    }
  }
  dependsOn: [newEnvironmentStorage, vaultAccess]
}

resource login 'Microsoft.App/containerApps/authConfigs@2025-07-01' = if (!empty(entraClientId)) {
  parent: app
  name: 'current'
  properties: {
    platform: { enabled: true }
    globalValidation: {
      unauthenticatedClientAction: 'RedirectToLoginPage'
      redirectToProvider: 'azureactivedirectory'
      // For programs, which have the key; /health only says whether the model is loaded.
      excludedPaths: ['/v1/models', '/v1/chat/completions', '/health']
    }
    identityProviders: {
      azureActiveDirectory: {
        enabled: true
        registration: { clientId: entraClientId, openIdIssuer: issuer }
        validation: { allowedAudiences: [entraClientId, 'api://${entraClientId}'] }
      }
    }
  }
}

// ---- Outputs for infra/inference.config.json

output SUBSCRIPTION_ID string = subscription().subscriptionId
output RESOURCE_GROUP_NAME string = resourceGroup().name
output STORAGE_ACCOUNT_NAME string = storageName
output FILE_SHARE_NAME string = shareName
output ACA_APP_NAME string = app.name
output ACA_APP_ENDPOINT string = 'https://${app.properties.configuration.ingress.fqdn}'
